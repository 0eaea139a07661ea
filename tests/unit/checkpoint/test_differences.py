"""What a resumed run says about settings that changed since its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_hgpt.checkpoint.differences import changed_settings
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import save_config, to_dict


def test_nothing_changed(tmp_path: Path) -> None:
    save_config(RunConfig(), tmp_path / "resolved_config.yaml")
    assert changed_settings(tmp_path, RunConfig()) == []


def test_every_changed_setting_with_both_values(tmp_path: Path) -> None:
    before = RunConfig()
    before.data.train, before.optimizer.lr = ["/a/old"], 1e-3
    before.engine.overrides = {"zero_optimization": {"overlap_comm": False}, "gone": 1}
    save_config(before, tmp_path / "resolved_config.yaml")
    now = RunConfig(output_dir="runs/moved")
    now.data.train, now.optimizer.lr = ["/a/new", "/b"], 2e-3
    now.engine.overrides = {"zero_optimization": {"overlap_comm": True}}
    now.model.hlora.generation = None
    changes = changed_settings(tmp_path, now)
    assert [change for change in changes if "hlora" not in change] == [
        "output_dir: runs/run -> runs/moved",
        "engine.overrides.zero_optimization.overlap_comm: false -> true",
        "data.train: [/a/old] -> [/a/new, /b]",
        "optimizer.lr: 0.001 -> 0.002",
        "engine.overrides.gone: 1 -> not set",
    ]
    assert "model.hlora.generation.lora_rank: 256 -> not set" in changes


def test_a_setting_of_a_newer_version_counts_as_its_default(tmp_path: Path) -> None:
    stored = to_dict(RunConfig())
    del stored["training"]["validation_interval_steps"]
    (tmp_path / "resolved_config.yaml").write_text(yaml.safe_dump(stored))
    assert changed_settings(tmp_path, RunConfig()) == []
    now = RunConfig()
    now.training.validation_interval_steps = 5
    assert changed_settings(tmp_path, now) == ["training.validation_interval_steps: 0 -> 5"]


@pytest.mark.parametrize("content", [None, "[1, 2]", "a: [", b"\xff"])
def test_an_unreadable_file_is_said_and_no_error(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "resolved_config.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (line,) = changed_settings(tmp_path, RunConfig())
    assert line.startswith(f"{path} cannot be read (") and "\n" not in line
