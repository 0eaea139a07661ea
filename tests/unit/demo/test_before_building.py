"""What the demo refuses in its first second, before it builds anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_hgpt.cli import main
from megatron_hgpt.demo import assets


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone=x", "the demo sets model.backbone itself"),
        ("model={backbone: x}", "the demo sets model.backbone itself"),
        ("checkpoint={directory: x}", "the demo sets checkpoint.directory itself"),
        ("training.sed=1", "did you mean training.seed?"),
        ("training.global_batch_size=1000000", "training.global_batch_size=1000000 must be int (1 to 65536)"),
        ("data.num_workers=100000", "data.num_workers=100000 must be int (0 to 256)"),
        ("training.seed=1e23", "training.seed='1e23' must be int"),
        ("training.micro_batch_size=3", "must be a multiple of micro_batch_size (3)"),
        ("model.transformer_impl=transformer_engine", "transformer_engine"),
        ("logging.wandb_project=x", "needs the package wandb"),
        ("engine.zero_stage=3", "engine.zero_stage=3 needs engine.name=deepspeed and is ignored by megatron"),
        ("model=&a {hf_config: *a}", "a value holds itself"),
    ],
)
def test_an_override_that_a_stage_would_refuse(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--output", str(tmp_path / "demo"), override]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_hold_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=50 * 2**20))
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 2
    assert "has 50 MiB free, the demo needs 200 MiB; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_step_with_a_damaged_marker_is_built_again(tmp_path: Path) -> None:
    for damage in ("{", "[1]", "[" * 100_000):
        (tmp_path / "step").mkdir(exist_ok=True)
        (tmp_path / "step" / assets.MARKER).write_text(damage)
        with assets.step("step", tmp_path / "step", {"a": 1}) as folder:
            assert folder is not None
        assert assets._content(tmp_path / "step" / assets.MARKER) == {"a": 1}
