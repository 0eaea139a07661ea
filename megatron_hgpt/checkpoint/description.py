"""What a checkpoint folder says about itself, and whether it fits a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hgpt.backbone.shape import FAMILIES, read_backbone
from megatron_hgpt.config import ModelConfig, RunConfig
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.files import read_json

FORMAT_VERSION = 2
INFO = "healthgpt.json"


def fingerprint(model: ModelConfig) -> dict[str, Any]:
    """What two models must share for one's weights to fit the other: sizes, vocabulary, plugins, vision depths."""
    vision, shape = model.vision, read_backbone(model.hf_config)
    return {
        "backbone": {field: getattr(shape, field) for field in _SHAPE_FIELDS},
        "vocabulary": {**dataclasses.asdict(model.vocabulary), "num_codes": model.vq.num_codes},
        "hlora": {
            name: None if plugin is None else {key: plugin[key] for key in ("lora_rank", "alpha", "num_experts")}
            for name, plugin in dataclasses.asdict(model.hlora).items()
        },
        "vision": {
            "hidden_size": vision.hf_config.get("hidden_size"),
            "comprehension_hidden_state": vision.comprehension_hidden_state,
            "generation_hidden_state": vision.generation_hidden_state,
        },
    }


_SHAPE_FIELDS = ("family", "num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim")
"""Of `BackboneShape`: a preset and a folder may spell the same shape with different keys."""


def _shape_of_version_1(sizes: dict[str, Any]) -> dict[str, Any]:
    """Version 1 held the keys of the backbone's config.json, those that it had."""
    family, heads = FAMILIES[sizes["architectures"][0]], sizes["num_attention_heads"]
    return {
        "family": family.model_type,
        "num_layers": sizes["num_hidden_layers"],
        "hidden_size": sizes["hidden_size"],
        "ffn_size": sizes["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": sizes.get("num_key_value_heads") or heads,
        "head_dim": sizes.get("head_dim") or sizes["hidden_size"] // heads,
    }


def seal(info: dict[str, Any]) -> dict[str, Any]:
    """A description as JSON will give it back, with the ``digest`` of everything else in it."""
    content = json.loads(json.dumps({key: value for key, value in info.items() if key != "digest"}))
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, "digest": hashlib.sha256(text.encode()).hexdigest()}


def check_seal(info: dict[str, Any], path: Path) -> None:
    """Compare the digest in a description with its content.

    Args:
        info: what `path` holds.
        path: for the message.

    Raises:
        CheckpointError: something was changed after it was sealed, or nothing was.
    """
    if info.get("digest") != seal(info)["digest"]:
        raise CheckpointError(f"{path} is damaged: its digest is not that of its content; use another checkpoint")


def checkpoint_folders(directory: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if re.fullmatch(r"step_\d{8}", path.name))


def read_info(folder: Path) -> dict[str, Any]:
    """The description beside the tensors; one of version 1 in the words of the present one.

    Raises:
        CheckpointError: the folder is no checkpoint of this package, or of another format than 1 and the present one.
    """
    path = folder / INFO
    if not path.is_file():
        hint = "; it is an unfinished write" if folder.name.endswith(".tmp") else ""
        raise CheckpointError(f"{folder} is not a checkpoint of this package ({INFO} is missing{hint})")
    info = read_json(path, CheckpointError)
    version = info.get("format_version")
    if version == 1:
        info["fingerprint"]["backbone"] = _shape_of_version_1(info["fingerprint"]["backbone"])
    elif version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version!r} is not one that this version reads (1 to {FORMAT_VERSION}); use the "
            "version of the package that wrote it, or train again"
        )
    return info


def _differences(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(set(mine) | set(theirs)):
        ours, other = mine.get(key), theirs.get(key)
        if isinstance(ours, dict) and isinstance(other, dict):
            yield from _differences(ours, other, f"{prefix}{key}.")
        elif ours != other:
            yield f"{prefix}{key}: the model has {ours}, the checkpoint {other}"


def check_fits(config: RunConfig, base: dict[str, str], folder: Path, info: dict[str, Any]) -> None:
    """Compare a checkpoint with the model that is to take it.

    Args:
        config: the model's.
        base: `base_identity` of its frozen weights.
        folder: for the message.
        info: `read_info` of the folder.

    Raises:
        CheckpointError: sizes or frozen weights differ.
    """
    # JSON turns tuples into lists: compare what a round trip leaves.
    mine = json.loads(json.dumps(fingerprint(config.model)))
    problems = list(_differences(mine, info["fingerprint"]))
    if problems:
        raise CheckpointError(
            f"{folder} belongs to another model: {'; '.join(problems)}. "
            "Use the configuration it was trained with (resolved_config.yaml beside the run) or another checkpoint."
        )
    problems = list(_differences(base, info["base"]))
    if problems:
        raise CheckpointError(
            f"{folder} was trained on other frozen weights: {'; '.join(problems)}. "
            "Name the same weights in model.backbone and model.vision.tower (resolved_config.yaml there says which)."
        )


def resolve_folder(path: Path) -> Path:
    """A checkpoint folder itself, or the newest one of a run folder or its ``checkpoints``.

    Raises:
        CheckpointError: there is none.
    """
    if (path / INFO).is_file() or path.name.startswith("step_"):
        return path
    for directory in (path, path / "checkpoints"):
        folders = checkpoint_folders(directory)
        if folders:
            return folders[-1]
    raise CheckpointError(f"{path} holds no complete checkpoint (step_* folder); train the earlier stage first")
