"""Hugging Face language models in and out of Megatron's GPTModel: one declarative table, used in both directions.

Each `Rule` says which HF tensors make up one Megatron tensor, how they are laid out there, and how that is sharded:

    Direct(axis)    the tensor as it is; sharded on `axis`, or whole (None)
    QKV             q, k, v rows interleaved per KV group:  [q of group 0 | k 0 | v 0 | q of group 1 | …]; axis 0
    GatedMLP        gate and up, cut apart and joined per tensor-parallel rank: [gate_i | up_i]; axis 0
    VocabPadded     text rows kept, the mean row for each VQ token, zeros for padding; axis 0

Phi's checkpoints fuse q|k|v and gate|up already, Llama's and Qwen's do not; both meet the same rules.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hgpt.backbone.names import unfused_name
from megatron_hgpt.backbone.shape import BackboneShape, read_backbone
from megatron_hgpt.errors import CheckpointError, ConfigError
from megatron_hgpt.files import read_json
from megatron_hgpt.text.vocabulary import Vocabulary

Reader = Callable[[str], torch.Tensor]
"""Returns one HF tensor, whole, by name."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """One Megatron tensor; subclasses know its layout."""

    megatron: str
    """Name in the GPTModel; ``{}`` stands for the layer."""
    hf: tuple[str, ...]
    """Names in the HF checkpoint, in the order of their rows."""

    @abstractmethod
    def to_megatron(self, parts: list[torch.Tensor], tp_size: int) -> list[torch.Tensor]:
        """The shards, one per tensor-parallel rank."""

    @abstractmethod
    def to_hf(self, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """The HF tensors, in the order of `hf`."""


@dataclass(frozen=True, kw_only=True)
class Direct(Rule):
    """The tensor as it is."""

    axis: int | None = None

    def to_megatron(self, parts: list[torch.Tensor], tp_size: int) -> list[torch.Tensor]:
        """As `Rule.to_megatron`."""
        return [parts[0]] * tp_size if self.axis is None else list(parts[0].chunk(tp_size, dim=self.axis))

    def to_hf(self, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `Rule.to_hf`."""
        return [shards[0] if self.axis is None else torch.cat(shards, dim=self.axis)]


@dataclass(frozen=True, kw_only=True)
class QKV(Rule):
    """Attention input projection (weight or bias), interleaved per KV group."""

    shape: BackboneShape

    def _sizes(self) -> list[int]:
        head = self.shape.head_dim
        return [self.shape.num_heads * head, self.shape.num_kv_heads * head, self.shape.num_kv_heads * head]

    def to_megatron(self, parts: list[torch.Tensor], tp_size: int) -> list[torch.Tensor]:
        """As `Rule.to_megatron`."""
        q, k, v = parts if len(parts) == 3 else parts[0].split(self._sizes())
        groups = [t.unflatten(0, (self.shape.num_kv_heads, -1)) for t in (q, k, v)]
        return list(torch.cat(groups, dim=1).flatten(0, 1).chunk(tp_size))

    def to_hf(self, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `Rule.to_hf`."""
        groups = torch.cat(shards).unflatten(0, (self.shape.num_kv_heads, -1))
        per_group = [size // self.shape.num_kv_heads for size in self._sizes()]
        parts = [part.flatten(0, 1) for part in groups.split(per_group, dim=1)]
        return parts if len(self.hf) == 3 else [torch.cat(parts)]


@dataclass(frozen=True, kw_only=True)
class GatedMLP(Rule):
    """Gate and up projection, joined per rank."""

    def to_megatron(self, parts: list[torch.Tensor], tp_size: int) -> list[torch.Tensor]:
        """As `Rule.to_megatron`."""
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(tp_size), up.chunk(tp_size), strict=True)]

    def to_hf(self, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `Rule.to_hf`."""
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        parts = [torch.cat(gates), torch.cat(ups)]
        return parts if len(self.hf) == 2 else [torch.cat(parts)]


@dataclass(frozen=True, kw_only=True)
class VocabPadded(Rule):
    """Embedding or head: old rows, then new rows as the mean of the old, then zero padding."""

    vocabulary: Vocabulary

    def to_megatron(self, parts: list[torch.Tensor], tp_size: int) -> list[torch.Tensor]:
        """As `Rule.to_megatron`."""
        text_size, size = self.vocabulary.text_size, self.vocabulary.size
        if parts[0].shape[0] < text_size:
            raise CheckpointError(
                f"{self.hf[0]} has {parts[0].shape[0]} rows but model.vocabulary.text_size={text_size}: "
                "set text_size to the number of text token ids"
            )
        if parts[0].shape[0] == size:
            # An exported model, whose VQ rows are trained: keep them.
            kept, mean_rows = parts[0], parts[0][:0]
        else:
            kept = parts[0][:text_size]
            # The matrix's own mean, in fp32 and before sharding.
            mean_rows = kept.float().mean(0, keepdim=True).to(kept.dtype).expand(size - text_size, -1)
        padding = kept.new_zeros(self.vocabulary.padded_size - size, kept.shape[1])
        return list(torch.cat([kept, mean_rows, padding]).chunk(tp_size))

    def to_hf(self, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `Rule.to_hf`; the padding is dropped, the VQ rows stay."""
        return [torch.cat(shards)[: self.vocabulary.size]]


def rules(shape: BackboneShape, vocabulary: Vocabulary) -> list[Rule]:
    """The table of one backbone. HF names below: Phi-3 (fused), Llama and Qwen2 (apart)."""
    hf, megatron = "model.layers.{}.", "decoder.layers.{}."
    if shape.fused_qkv:
        qkv: tuple[str, ...] = ("self_attn.qkv_proj",)
        fc1: tuple[str, ...] = ("mlp.gate_up_proj",)
    else:
        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        fc1 = ("mlp.gate_proj", "mlp.up_proj")

    def names(stems: tuple[str, ...], leaf: str) -> tuple[str, ...]:
        return tuple(f"{hf}{stem}.{leaf}" for stem in stems)

    head = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    table: list[Rule] = [
        VocabPadded(
            megatron="embedding.word_embeddings.weight", hf=("model.embed_tokens.weight",), vocabulary=vocabulary
        ),
        Direct(megatron=megatron + "input_layernorm.weight", hf=(hf + "input_layernorm.weight",)),
        QKV(megatron=megatron + "self_attention.linear_qkv.weight", hf=names(qkv, "weight"), shape=shape),
        Direct(megatron=megatron + "self_attention.linear_proj.weight", hf=(hf + "self_attn.o_proj.weight",), axis=1),
        Direct(megatron=megatron + "pre_mlp_layernorm.weight", hf=(hf + "post_attention_layernorm.weight",)),
        GatedMLP(megatron=megatron + "mlp.linear_fc1.weight", hf=names(fc1, "weight")),
        Direct(megatron=megatron + "mlp.linear_fc2.weight", hf=(hf + "mlp.down_proj.weight",), axis=1),
        Direct(megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",)),
        VocabPadded(megatron="output_layer.weight", hf=(head,), vocabulary=vocabulary),
    ]
    if shape.qkv_bias:
        table.append(QKV(megatron=megatron + "self_attention.linear_qkv.bias", hf=names(qkv, "bias"), shape=shape))
    return table


_DROPPED_SUFFIXES = ("rotary_emb.inv_freq",)
"""HF buffers that are computed, not weights."""


def is_backbone_parameter(name: str) -> bool:
    """Whether a parameter of the language model comes from the HF checkpoint."""
    return ".hlora." not in name


def _expand(table: list[Rule], num_layers: int) -> Iterator[tuple[str, tuple[str, ...], Rule]]:
    """(Megatron name, HF names, rule) with layers filled in."""
    for rule in table:
        for layer in range(num_layers) if "{}" in rule.megatron else (None,):
            yield (
                rule.megatron if layer is None else rule.megatron.format(layer),
                tuple(name if layer is None else name.format(layer) for name in rule.hf),
                rule,
            )


def open_checkpoint(folder: Path) -> tuple[set[str], Reader]:
    """Names and a reader of a folder of safetensors files; each tensor is read when it is asked for.

    Raises:
        CheckpointError: no safetensors files, a damaged one, or an index that names a missing file or tensor.
    """
    from safetensors import SafetensorError, safe_open

    handles: dict[str, Any] = {}

    def handle_of(file: str) -> Any:
        if file not in handles:
            try:
                handles[file] = safe_open(folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / file} is not a readable safetensors file: {error}") from error
        return handles[file]

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(files, dict):
            raise CheckpointError(f"{index} has no weight_map from tensors to files: download the folder again")
    elif (folder / "model.safetensors").is_file():
        files = dict.fromkeys(handle_of("model.safetensors").keys(), "model.safetensors")
    else:
        pickled = " (pytorch_model.bin is there: convert it with transformers' save_pretrained)"
        raise CheckpointError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json"
            f"{pickled if list(folder.glob('pytorch_model*.bin')) else ''}"
        )

    def read(name: str) -> torch.Tensor:
        file = files[name]
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise CheckpointError(f"{index} names {file!r} for {name}, which is not a file of {folder}")
        try:
            return handle_of(file).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{folder / file} does not hold {name}: {error}") from error

    return set(files), read


def _shape_of(folder: Path, shape: BackboneShape) -> BackboneShape:
    """`shape` with the folder's tie flag, which is the file's business alone; everything else must agree.

    Raises:
        CheckpointError: the folder's config.json is missing, unsupported, or describes another model.
    """
    try:
        found = read_backbone(read_json(folder / "config.json", CheckpointError))
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    wanted = dataclasses.replace(shape, tied=found.tied)
    for field in dataclasses.fields(BackboneShape):
        there, here = getattr(found, field.name), getattr(wanted, field.name)
        # A float may have been through fp32 on its way into the file.
        if there != here and not (isinstance(there, float) and math.isclose(there, here, rel_tol=1e-6)):
            raise CheckpointError(
                f"{folder / 'config.json'} gives {field.name}={there}, model.hf_config gives {here}: "
                "copy the folder's config.json into model.hf_config"
            )
    return wanted


@torch.no_grad()
def load_backbone(
    model: torch.nn.Module,
    folder: str | Path,
    shape: BackboneShape,
    vocabulary: Vocabulary,
    *,
    tp_rank: int,
    tp_size: int,
    layer_offset: int = 0,
) -> None:
    """Fill the backbone's parameters of a GPTModel shard from a Hugging Face folder, tensor by tensor.

    Args:
        model: the GPTModel of this rank; parameters under ``.hlora.`` are left alone.
        folder: config.json and safetensors.
        shape, vocabulary: of the model.
        tp_rank, tp_size: this rank's shard.
        layer_offset: number of layers on earlier pipeline stages.

    Raises:
        CheckpointError: another model's config.json, HF tensors without a place, model parameters without a source,
            or shapes that differ.
    """
    folder = Path(folder)
    shape = _shape_of(folder, shape)
    present, read = open_checkpoint(folder)
    parameters = {unfused_name(name): p for name, p in model.named_parameters() if is_backbone_parameter(name)}
    table = list(_expand(rules(shape, vocabulary), shape.num_layers))
    known = {name for _, names, _ in table for name in names} | ({"lm_head.weight"} if shape.tied else set())
    missing = sorted({name for _, names, _ in table for name in names} - present)
    unexpected = sorted(name for name in present - known if not name.endswith(_DROPPED_SUFFIXES))
    if missing or unexpected:
        raise CheckpointError(
            f"{folder} does not hold the tensors of a {shape.family} model of {shape.num_layers} layers: "
            f"missing {missing[:4]} ({len(missing)}), unexpected {unexpected[:4]} ({len(unexpected)})"
        )
    filled = set()
    for megatron, names, rule in table:
        local = _local_name(megatron, layer_offset)
        if local not in parameters:
            continue
        parts = [read(name) for name in names]
        try:
            shard = rule.to_megatron(parts, tp_size)[tp_rank]
        except CheckpointError:
            raise
        except (RuntimeError, ValueError) as error:  # torch's split, unflatten and cat on sizes that do not fit
            raise CheckpointError(_misfit(folder, names, parts, megatron)) from error
        if shard.shape != parameters[local].shape:
            raise CheckpointError(_misfit(folder, names, parts, megatron))
        parameters[local].copy_(shard)
        filled.add(local)
    empty = sorted(set(parameters) - filled)
    if empty:
        raise CheckpointError(f"{folder} fills no value for {len(empty)} parameters of the model, e.g. {empty[:3]}")


def _misfit(folder: Path, names: tuple[str, ...], parts: list[torch.Tensor], megatron: str) -> str:
    sizes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(names, parts, strict=True))
    return f"{folder}: {sizes} do not fit {megatron}: config.json does not describe this checkpoint"


def _local_name(name: str, layer_offset: int) -> str:
    if layer_offset == 0 or not name.startswith("decoder.layers."):
        return name
    layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
    return f"decoder.layers.{int(layer) - layer_offset}.{rest}"


def export_backbone(
    shards: list[dict[str, torch.Tensor]], shape: BackboneShape, vocabulary: Vocabulary
) -> dict[str, torch.Tensor]:
    """The inverse of `load_backbone`: Hugging Face tensors from the state dicts of all tensor-parallel ranks.

    Embedding and head keep their VQ rows and lose the padding; a tied checkpoint comes out untied.

    Raises:
        CheckpointError: a tensor of the table is missing in a shard.
    """
    untied = dataclasses.replace(shape, tied=False)
    shards = [{unfused_name(name): tensor for name, tensor in shard.items()} for shard in shards]
    result: dict[str, torch.Tensor] = {}
    for megatron, names, rule in _expand(rules(untied, vocabulary), shape.num_layers):
        if any(megatron not in shard for shard in shards):
            raise CheckpointError(f"the state dict lacks {megatron}")
        result.update(zip(names, rule.to_hf([shard[megatron] for shard in shards]), strict=True))
    return {name: tensor.contiguous() for name, tensor in result.items()}
