"""A Hugging Face folder into this rank's language model, tensor by tensor, and back: `rules` in both directions."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from megatron_hgpt.backbone.names import unfused_name
from megatron_hgpt.backbone.shape import BackboneShape, read_backbone
from megatron_hgpt.convert.rules import expand, is_backbone_parameter, rules
from megatron_hgpt.convert.safetensors_files import open_checkpoint
from megatron_hgpt.errors import CheckpointError, ConfigError
from megatron_hgpt.files import read_json
from megatron_hgpt.text.vocabulary import Vocabulary

_DROPPED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Buffers of old Hugging Face files that are computed rather than trained."""


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
    table = list(expand(rules(shape, vocabulary), shape.num_layers))
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
    for megatron, names, rule in expand(rules(untied, vocabulary), shape.num_layers):
        if any(megatron not in shard for shard in shards):
            raise CheckpointError(f"the state dict lacks {megatron}")
        result.update(zip(names, rule.to_hf([shard[megatron] for shard in shards]), strict=True))
    return {name: tensor.contiguous() for name, tensor in result.items()}
