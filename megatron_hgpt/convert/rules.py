"""Hugging Face language models in and out of Megatron's GPTModel: one declarative table, used in both directions.

Each `Rule` says which HF tensors make up one Megatron tensor, how they are laid out there, and how that is sharded:

    Direct(axis)    the tensor as it is; sharded on `axis`, or whole (None)
    QKV             q, k, v rows interleaved per KV group:  [q of group 0 | k 0 | v 0 | q of group 1 | …]; axis 0
    GatedMLP        gate and up, cut apart and joined per tensor-parallel rank: [gate_i | up_i]; axis 0
    VocabPadded     text rows kept, the mean row for each VQ token, zeros for padding; axis 0

Phi's checkpoints fuse q|k|v and gate|up already, Llama's and Qwen's do not; both meet the same rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_hgpt.backbone.shape import BackboneShape
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.text.vocabulary import Vocabulary


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


def is_backbone_parameter(name: str) -> bool:
    """Whether a parameter of the language model comes from the HF checkpoint."""
    return ".hlora." not in name


def expand(table: list[Rule], num_layers: int) -> Iterator[tuple[str, tuple[str, ...], Rule]]:
    """(Megatron name, HF names, rule) with layers filled in."""
    for rule in table:
        for layer in range(num_layers) if "{}" in rule.megatron else (None,):
            yield (
                rule.megatron if layer is None else rule.megatron.format(layer),
                tuple(name if layer is None else name.format(layer) for name in rule.hf),
                rule,
            )
