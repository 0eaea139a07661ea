"""Steps of the demo's asset builder: complete or absent, built again when an input changes, never a foreign folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.demo import assets as assets_module
from megatron_hgpt.demo.stage_configs import STAGES, model_section, write_stage_config
from megatron_hgpt.errors import DataError
from megatron_hgpt.model_folders import load_resolved
from megatron_hgpt.validation import find_problems
from megatron_hgpt.vision.vqgan import VQGAN


def _run(folder: Path, inputs: dict[str, int], content: str) -> bool:
    with assets_module.step("thing", folder, inputs) as target:
        if target is not None:
            (target / "file").write_text(content)
    return target is not None


def test_step_runs_once_per_input(tmp_path: Path) -> None:
    folder = tmp_path / "thing"
    assert _run(folder, {"a": 1}, "first")
    assert not _run(folder, {"a": 1}, "second")
    assert (folder / "file").read_text() == "first"
    assert _run(folder, {"a": 2}, "third")
    assert (folder / "file").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_failed_step_leaves_the_old_result(tmp_path: Path) -> None:
    folder = tmp_path / "thing"
    _run(folder, {"a": 1}, "first")
    with pytest.raises(RuntimeError, match="broken"), assets_module.step("thing", folder, {"a": 2}) as target:
        (target / "file").write_text("half")
        raise RuntimeError("broken")
    assert (folder / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "precious").write_text("x")
    with pytest.raises(DataError, match="not written by this tool"):
        _run(tmp_path / "thing", {"a": 1}, "first")
    assert (tmp_path / "thing" / "precious").read_text() == "x"


def test_tower_and_backbone_are_rebuilt_only_for_another_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    for seed in (0, 0, 1):
        assets_module.build_tower(tmp_path / "tower", seed=seed)
        assets_module.build_tiny_backbone(tmp_path / "backbone", text_vocab_size=100, seed=seed)
    text = capsys.readouterr().out
    assert text.count("skipped") == 2 and text.count("done in") == 4
    assert json.loads((tmp_path / "backbone" / "config.json").read_text())["vocab_size"] == 100


def test_all_tiny_assets(tmp_path: Path) -> None:
    for package in ("pydicom", "nibabel", "skimage", "transformers"):
        pytest.importorskip(package)
    assets = assets_module.build_assets(tmp_path, backbone="tiny", vqgan_steps=2)
    assert assets == json.loads((tmp_path / "assets.json").read_text())
    for name in ("backbone", "tokenizer", "tower", "vqgan", "train", "test"):
        assert (tmp_path / assets[name]).exists()
    config = json.loads((tmp_path / assets["backbone"] / "config.json").read_text())
    assert config["vocab_size"] == assets["text_vocab_size"]
    VQGAN.load(tmp_path / assets["vqgan"])
    _check_stage_configs(tmp_path, assets)


def _check_stage_configs(folder: Path, assets: dict[str, Any]) -> None:
    """Paths alone describe the model, and the preset beneath agrees with what they say."""
    model = model_section(assets, folder)
    assert sorted(model) == ["backbone", "tokenizer", "vision", "vocabulary", "vq"]
    for stage in STAGES:
        config = load_resolved(write_stage_config(folder / "run", "tiny", stage, model, []))
        assert config.model.vocabulary.text_size == assets["text_vocab_size"]
        assert config.model.template == "phi3_instruct"
        assert find_problems(config, 2, check_paths=False) == []
