"""What a checkpoint folder says about itself, and whether it fits a model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_hgpt.backbone.shape import FAMILIES, read_backbone
from megatron_hgpt.checkpoint.metadata_file import METADATA
from megatron_hgpt.config import ModelConfig, RunConfig
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.files import read_json, sealed
from megatron_hgpt.parameters import SAVED_GROUPS
from megatron_hgpt.stages import STAGES

FORMAT_VERSION = 3
INFO = "healthgpt.json"
MAX_INFO_BYTES = 64 * 2**20
"""Far above what the files of thousands of ranks take."""


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


def _shape_of_version_1(sizes: dict[str, Any], path: Path) -> dict[str, Any]:
    """Version 1 held the keys of the backbone's config.json, those that it had."""
    try:
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
    except (LookupError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} is damaged: fingerprint.backbone is no shape; use another checkpoint") from error


def check_seal(info: dict[str, Any], path: Path) -> None:
    """Compare the digest in a description with its content.

    Args:
        info: what `path` holds.
        path: for the message.

    Raises:
        CheckpointError: something was changed after it was sealed, or nothing was.
    """
    if info.get("digest") != sealed(info)["digest"]:
        raise CheckpointError(f"{path} is damaged: its digest is not that of its content; use another checkpoint")


def checkpoint_folders(directory: Path) -> list[Path]:
    """Complete checkpoints in a folder, in the order of their publication; those that cannot be read come last.

    Not by step: a run that went back leaves checkpoints of later steps behind, which it must not go on from.
    """
    if not directory.is_dir():
        return []

    def rank(folder: Path) -> tuple[float, str]:
        number = publication_of(folder)
        return (math.inf if number is None else number, folder.name)

    return sorted((path for path in directory.iterdir() if _STEP_FOLDER.fullmatch(path.name)), key=rank)


def publication_of(folder: Path) -> int | None:
    """Which publication of its directory a checkpoint was; 0 where it does not say; None where it cannot be read."""
    try:
        number = read_info(folder).get("publication", 0)
    except CheckpointError:
        return None
    return number if isinstance(number, int) else None


_STEP_FOLDER = re.compile(r"step_(\d{8})")


def read_info(folder: Path) -> dict[str, Any]:
    """The description beside the tensors, checked; one of an earlier version in the words of the present one.

    Versions 1 and 2 have no checksums: ``files`` is empty then, and ``digest`` is that of the text.

    Raises:
        CheckpointError: the folder is no checkpoint of this package, is damaged, or of another format than 1 to the
            present one.
    """
    path = folder / INFO
    if not path.is_file():
        hint = "; it is an unfinished write" if folder.name.endswith(".tmp") else ""
        raise CheckpointError(f"{folder} is not a checkpoint of this package ({INFO} is missing{hint})")
    if (size := path.stat().st_size) > MAX_INFO_BYTES:
        raise CheckpointError(f"{path} is refused: {size} bytes; use another checkpoint")
    try:
        info = read_json(path, CheckpointError)
        sealed(info)
    except RecursionError as error:
        raise CheckpointError(f"cannot read {path}: it nests too deeply; use another checkpoint") from error
    version = info.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version!r} is not one that this version reads (1 to {FORMAT_VERSION}); use the "
            "version of the package that wrote it, or train again"
        )
    if version < 3:
        info = {**sealed(info), "files": {}, "is_healthy": True}
    else:
        check_seal(info, path)
    if problem := next(_problems(folder, info), None):
        raise CheckpointError(f"{path} is damaged: {problem}; use another checkpoint")
    if version == 1:
        info["fingerprint"]["backbone"] = _shape_of_version_1(info["fingerprint"].get("backbone", {}), path)
    return info


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _is_mapping_to(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_value, value.values()))


def _is_plain(value: Any) -> bool:
    """A text or number, or a list of them."""
    return all(one is None or isinstance(one, str | int | float) for one in (value if type(value) is list else [value]))


def _is_part_of_fingerprint(value: Any) -> bool:
    return _is_mapping_to(lambda one: _is_plain(one) or _is_mapping_to(_is_plain)(one))(value)


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and _is_count(value.get("bytes")) and isinstance(value.get("sha256"), str)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "stage": (lambda value: isinstance(value, str) and value in STAGES, "a stage"),
    "step": (_is_count, "a number of steps"),
    "is_healthy": (lambda value: isinstance(value, bool), "true or false"),
    "trained_groups": (
        lambda value: isinstance(value, list) and {*map(str, value)} <= {*SAVED_GROUPS, "new_rows"},
        "a list of groups of parameters",
    ),
    "optimizer_steps": (_is_mapping_to(_is_count), "a mapping to numbers of steps"),
    "loader": (lambda value: isinstance(value, dict) and _is_count(value.get("step")), "a mapping with a step"),
    "rng_layout": (
        lambda value: isinstance(value, list) and len(value) == 3 and all(_is_count(size) and size for size in value),
        "a list of three sizes",
    ),
    "fingerprint": (_is_mapping_to(_is_part_of_fingerprint), "a mapping to mappings"),
    "base": (_is_mapping_to(lambda value: isinstance(value, str)), "a mapping to texts"),
    "files": (_is_mapping_to(_is_file), "a mapping to bytes and sha256"),
}
"""Field -> what it must be, as a test and in words."""


def _problems(folder: Path, info: dict[str, Any]) -> Iterator[str]:
    for name, (is_right, words) in _FIELDS.items():
        if name not in info:
            yield f"it has no {name}"
        elif not is_right(info[name]):
            yield f"{name} is {str(info[name])[:60]}, not {words}"
    if (match := _STEP_FOLDER.fullmatch(folder.name)) and int(match[1]) != info["step"]:
        yield f"it is of step {info['step']}, in a folder of step {int(match[1])}"
    for name in info["files"]:
        if name in (".", "..") or "/" in name or "\0" in name:
            yield f"{name!r} is no file of the folder"
    if info["format_version"] > 2 and (missing := {METADATA, "resolved_config.yaml"} - info["files"].keys()):
        yield f"files does not list {sorted(missing)[0]}"


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


def folders_of(path: Path) -> list[Path]:
    """A checkpoint folder itself, or the checkpoints of a run folder or of its ``checkpoints``, newest first.

    Raises:
        CheckpointError: there is none.
    """
    if (path / INFO).is_file() or path.name.startswith("step_"):
        return [path]
    for directory in (path, path / "checkpoints"):
        if folders := checkpoint_folders(directory):
            return folders[::-1]
    raise CheckpointError(f"{path} holds no complete checkpoint (step_* folder); train the earlier stage first")
