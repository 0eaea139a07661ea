"""The digest of frozen weights: the same for the same tensors, another for other ones, without reading them whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_hgpt.checkpoint.frozen_base import base_identity, weights_digest
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import load_config
from megatron_hgpt.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(4000.0).view(40, 100), "b.bias": torch.ones(3, dtype=torch.bfloat16)}


def write(folder: Path, *files: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    for i, content in enumerate(files):
        save_file(content, folder / f"model-{i}.safetensors", metadata={"format": "pt"})
    return folder


def test_the_same_tensors_in_other_files_are_the_same(tmp_path: Path) -> None:
    whole = tensors()
    one = write(tmp_path / "one", whole)
    two = write(tmp_path / "two", {"b.bias": whole["b.bias"]}, {"a.weight": whole["a.weight"]})
    assert weights_digest(one) == weights_digest(two)
    assert weights_digest(one).startswith("sha256:") and len(weights_digest(one)) == 71


@pytest.mark.parametrize("place", [0, 2000, 3999], ids=["first KiB", "middle", "last KiB"])
def test_other_values_are_seen(place: int, tmp_path: Path) -> None:
    other = tensors()
    other["a.weight"].view(-1)[place] += 1
    assert weights_digest(write(tmp_path / "one", tensors())) != weights_digest(write(tmp_path / "two", other))


@pytest.mark.parametrize("change", ["name", "type", "shape", "fewer"])
def test_other_tensors_are_seen(change: str, tmp_path: Path) -> None:
    other = tensors()
    weight = other.pop("a.weight")
    if change != "fewer":
        name = "c.weight" if change == "name" else "a.weight"
        other[name] = {"type": weight.int(), "shape": weight.view(100, 40)}.get(change, weight)
    assert weights_digest(write(tmp_path / "one", tensors())) != weights_digest(write(tmp_path / "two", other))


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, (8).to_bytes(8, "little") + b"[1,2,3] "])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
        weights_digest(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        weights_digest(tmp_path)


def identity(*overrides: str) -> dict[str, str]:
    config: RunConfig = load_config(preset="tiny", overrides=list(overrides))
    return base_identity(config)


def test_random_weights_are_named_by_what_decides_them(tmp_path: Path) -> None:
    drawn = identity("training.seed=7")
    assert drawn["backbone"] == "random weights, training.seed=7"
    assert drawn["vision_tower"].startswith("random weights, ")
    assert identity("training.seed=8")["backbone"] != drawn["backbone"]
    assert identity("model.vision.hf_config.num_attention_heads=1")["vision_tower"] != drawn["vision_tower"]
    folder = write(tmp_path / "tower", tensors())
    assert identity(f"model.vision.tower={folder}")["vision_tower"] == weights_digest(folder)
    assert identity(f"model.backbone={folder}")["backbone"] == weights_digest(folder)


@pytest.mark.parametrize("offsets", [[5, 4], [-1, 4], [None, 4], ["0", "4"], [4], 7])
def test_places_that_cannot_be_are_refused(offsets: Any, tmp_path: Path) -> None:
    """An end before its begin would read the whole file, for a sample of a KiB."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    with pytest.raises(CheckpointError, match="is not a readable safetensors file: x"):
        weights_digest(tmp_path)
