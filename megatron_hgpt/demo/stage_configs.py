"""The configurations of the demo's stages: checked before anything is built, written, and compared with the last run's.

A folder is replaced only where a file of the demo says that it is the demo's.
"""

from __future__ import annotations

import json
import operator
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_hgpt.config_io import dump, load_config
from megatron_hgpt.demo.assets import MARKER as ASSET_MARKER
from megatron_hgpt.demo.assets import digest
from megatron_hgpt.errors import ConfigError, DataError, raise_problems
from megatron_hgpt.files import free_bytes, read_json, why_not_writable, write_atomic
from megatron_hgpt.model_folders import load_resolved

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: the demo runs its commands and takes its configurations from there."""
PREVIOUS = {"stage1": None, "stage2": "stage1", "stage3": "stage2"}
"""Stage -> the one that it starts from."""
STAGES = tuple(PREVIOUS)
INPUTS = {"train": "train", "held-out": "test"}
"""Dataset folder -> its records' name among the assets."""
MARKER = "demo_config.yaml"
"""In a stage's folder: the format of its checkpoints, what it was made from, and its resolved configuration."""
OWN_KEYS = (
    "output_dir",
    "data.train",
    "data.validation",
    "checkpoint.init_from",
    "checkpoint.directory",
    "model.backbone",
    "model.tokenizer",
    "model.vision.tower",
    "model.vq.path",
)
"""What the demo sets itself: an override would send its steps to different folders."""


NEEDED_BYTES = 200 * 2**20
"""Everything of the tiny demo is 90 MB; a checkpoint takes its place beside the one before."""


def check_before_building(output: Path, backbone: str, overrides: Sequence[str]) -> None:
    """Refuse in the first seconds what a stage would refuse after minutes.

    Raises:
        ConfigError: one for all that is wrong in the stages' configurations with the overrides.
        DataError: a folder that the demo writes is there and is not its own, or cannot be written.
    """
    configs = [load_config(_shipped(backbone, stage), overrides) for stage in STAGES]
    shipped = load_config(_shipped(backbone, STAGES[0]))
    for key in OWN_KEYS:  # also where a whole section was given, as model={backbone: x}
        if operator.attrgetter(key)(configs[0]) != operator.attrgetter(key)(shipped):
            raise ConfigError(f"{' '.join(overrides)}: the demo sets {key} itself; choose its folder with --output")
    _refuse_full(output)
    _refuse_foreign(output)
    from megatron_hgpt.batching import replica_size
    from megatron_hgpt.validation import find_problems, missing_packages

    problems = missing_packages(configs[0])
    for config in configs:
        config.data.train = [str(output / "data" / "not written yet")]
        problems += find_problems(config, max(1, replica_size(config.parallel)), check_paths=False)
    raise_problems(problems)


def _shipped(backbone: str, stage: str) -> Path:
    return ROOT / "examples" / "configs" / f"{backbone}_{stage}.yaml"


def _refuse_foreign(output: Path) -> None:
    for stage in STAGES:
        _is_current(output / stage, "")
    is_of_demo = (output / "assets" / "assets.json").is_file()  # older demos left nothing else beside their datasets
    for name in INPUTS:
        folder = output / "data" / name
        if folder.exists() and not (_settings_file(folder).is_file() or is_of_demo):
            raise _foreign(folder)


def _refuse_full(output: Path) -> None:
    if problem := why_not_writable(output, is_folder=True):
        raise DataError(f"--output {output} cannot be written: {problem}; name another place")
    free = free_bytes(output)
    if free < NEEDED_BYTES:
        raise DataError(
            f"--output {output} has {free / 2**20:.0f} MiB free, the demo needs {NEEDED_BYTES / 2**20:.0f} MiB; "
            "nothing was written: make room, or name another place"
        )


def _foreign(folder: Path) -> DataError:
    return DataError(f"{folder} exists and the demo did not write it; remove it or choose another --output")


def _is_current(folder: Path, wanted: str) -> bool:
    """Whether the stage in `folder` ran with the marker `wanted`; a folder that is not there did not.

    Raises:
        DataError: the folder holds something, and no marker.
    """
    marker = folder / MARKER
    if not marker.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise _foreign(folder)
        return False
    return marker.read_text(encoding="utf-8") == wanted


def model_section(assets: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The paths of the assets as a `model` section: sizes, template and vocabulary are read from them."""
    section: dict[str, Any] = {
        "backbone": str(folder / assets["backbone"]),
        "vision": {"tower": str(folder / assets["tower"])},
        "vq": {"path": str(folder / assets["vqgan"])},
        "vocabulary": {"text_size": None},  # the preset's is for a model without a tokenizer
    }
    if assets["tokenizer"] != assets["backbone"]:
        section["tokenizer"] = str(folder / assets["tokenizer"])
    return section


def write_stage_config(
    output: Path, backbone: str, stage: str, model: Mapping[str, Any], overrides: Sequence[str]
) -> Path:
    """Write the configuration of one stage over the shipped one; returns its file.

    A stage starts afresh where its last run had another configuration, other assets or another stage before it, or left
    checkpoints of another format.

    Raises:
        DataError: the stage's folder is not the demo's.
    """
    from megatron_hgpt.checkpoint.description import FORMAT_VERSION

    previous = PREVIOUS[stage]
    values = {
        "base": str(_shipped(backbone, stage)),
        "output_dir": str(output / stage),
        "model": dict(model),
        "data": {"train": [str(output / "data" / "train")], "validation": [str(output / "data" / "held-out")]},
        "checkpoint": {"init_from": [str(output / previous)] if previous else []},
    }
    path = output / f"{stage}.yaml"
    write_atomic(path, yaml.safe_dump(values, sort_keys=False))
    inputs = sorted((output / "assets").glob(f"*/{ASSET_MARKER}"))
    inputs += [output / previous / MARKER] if previous and (output / previous / MARKER).is_file() else []
    head = f"# checkpoint format {FORMAT_VERSION}, inputs {digest(*inputs)}\n"
    marker = head + dump(load_resolved(path, overrides))
    if not _is_current(output / stage, marker):
        _empty(output / stage)
        write_atomic(output / stage / MARKER, marker)
    return path


def _empty(folder: Path) -> None:
    """Remove what a stage left; its marker stays, so that the folder is the demo's even if this is interrupted."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()


def dataset_settings(config: Path, overrides: Sequence[str], records: Path) -> dict[str, Any]:
    """What a dataset of the demo depends on: the configuration's part in it and the contents of what is read."""
    run = load_resolved(config, overrides)
    model = run.model
    read = ((model.vq.path, "last.ckpt"), (model.tokenizer or model.backbone, "tokenizer.json"))
    files = [records, *(Path(folder) / name for folder, name in read if folder)]
    return {
        "files": {file.name: digest(file) for file in files if file.is_file()},
        "template": model.template,
        "system_prompt": model.system_prompt,
        "max_seq_length": model.max_seq_length,
        "max_image_side": run.data.max_image_side,
        "text_size": model.vocabulary.text_size,
        "pad_to_multiple": model.vocabulary.pad_to_multiple,
        "num_codes": model.vq.num_codes,
        "num_indices": model.vq.num_indices,
    }


def dataset_is_current(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the dataset was written with these settings."""
    file = _settings_file(folder)
    return (folder / "manifest.json").is_file() and file.is_file() and read_json(file) == settings


def claim_dataset(folder: Path, settings: Mapping[str, Any]) -> None:
    """Say that the dataset is the demo's, and what it was written with; an empty mapping before it is written."""
    write_atomic(_settings_file(folder), json.dumps(settings, indent=1) + "\n")


def _settings_file(folder: Path) -> Path:
    """Beside the dataset: the folder itself is replaced as a whole."""
    return folder.with_name(f"{folder.name}.demo.json")
