"""Depths, freezing and file errors of the CLIP tower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hgpt.config import VisionConfig
from megatron_hgpt.demo.checkpoints import write_tiny_clip
from megatron_hgpt.errors import CheckpointError, ConfigError
from megatron_hgpt.samples import TASKS, Task
from megatron_hgpt.vision.clip import HVPTower

_HF_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_clip(tmp_path, image_size=32, hidden_size=32, num_heads=2, ffn=64)
    return tmp_path


def test_each_task_runs_only_its_blocks(folder: Path) -> None:
    tower = HVPTower.from_config(VisionConfig(tower=str(folder)), TASKS)
    calls: list[int] = []
    for i, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    pixels = torch.zeros(1, 3, 32, 32)
    features = tower(pixels, Task.GENERATION)
    assert calls == [0]
    assert features.shape == (1, tower.num_image_tokens, tower.hidden_size) == (1, 16, 32)
    calls.clear()
    tower(pixels, Task.COMPREHENSION)
    assert calls == [0, 1]  # -2 of 4 hidden states is the one after block 2 of 3


def test_blocks_that_no_task_needs_are_not_kept(folder: Path) -> None:
    vision = VisionConfig(tower=str(folder))
    assert len(HVPTower.from_config(vision, TASKS).blocks) == 2
    assert len(HVPTower.from_config(vision, [Task.GENERATION]).blocks) == 1


def test_stays_frozen_and_in_evaluation_mode(folder: Path) -> None:
    tower = HVPTower.from_config(VisionConfig(tower=str(folder)), TASKS)
    tower.train()
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    pixels = torch.zeros(1, 3, 32, 32, requires_grad=True)
    assert not tower(pixels, Task.COMPREHENSION).requires_grad


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("comprehension_hidden_state", 4),
        ("comprehension_hidden_state", -5),
        ("generation_hidden_state", 24),
        ("generation_hidden_state", True),
    ],
)
def test_a_depth_outside_the_tower_is_refused(folder: Path, field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        HVPTower.from_config(VisionConfig(tower=str(folder), **{field: value}), TASKS)


def test_random_tower_is_the_same_every_time_and_leaves_the_generator_alone() -> None:
    vision = VisionConfig(hf_config=_HF_CONFIG)
    before = torch.get_rng_state()
    first, second = (HVPTower.from_config(vision, TASKS).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ConfigError, match="hf_config"):
        HVPTower.from_config(VisionConfig(), TASKS)


def test_missing_and_misshapen_tensors_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(key for key in state if key.endswith("layers.1.mlp.fc1.weight"))
    vision = VisionConfig(tower=str(folder))
    save_file({key: tensor for key, tensor in state.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.fc1\.weight"):
        HVPTower.from_config(vision, TASKS)
    save_file(state | {name: state[name][:, :5].contiguous()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(?s)cannot load|wrong shape"):
        HVPTower.from_config(vision, TASKS)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot load"):
        HVPTower.from_config(vision, TASKS)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot load"):
        HVPTower.from_config(vision, TASKS)


def test_folder_that_is_no_checkpoint_or_of_another_size(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        HVPTower.from_config(VisionConfig(tower=str(tmp_path / "none")), TASKS)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 32
    with pytest.raises(CheckpointError, match="hidden_size=32"):
        HVPTower.from_config(VisionConfig(tower=str(folder), hf_config=_HF_CONFIG | {"hidden_size": 48}), TASKS)


def test_config_that_describes_no_tower(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for text in ("{oops", json.dumps(content | {"num_attention_heads": 5})):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            HVPTower.from_config(VisionConfig(tower=str(folder)), TASKS)
    with pytest.raises(ConfigError, match=r"model\.vision\.hf_config"):
        HVPTower.from_config(VisionConfig(hf_config=_HF_CONFIG | {"num_attention_heads": 5}), TASKS)
    with pytest.raises(ConfigError, match="at least one task"):
        HVPTower.from_config(VisionConfig(hf_config=_HF_CONFIG), [])


def test_blocks_beyond_the_configured_ones_are_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    # Index -2 would silently be one block shallower. Fails without `unexpected` in `_load`.
    with pytest.raises(CheckpointError, match=r"unexpected .*layers\.2\."):
        HVPTower.from_config(VisionConfig(tower=str(folder)), TASKS)


def test_a_misspelt_size_is_refused(folder: Path) -> None:
    for tower in (None, str(folder)):
        vision = VisionConfig(tower=tower, hf_config={"num_hiden_layers": 3})
        with pytest.raises(ConfigError, match="num_hiden_layers is not a field .* did you mean num_hidden_layers"):
            HVPTower.from_config(vision, [Task.GENERATION])
