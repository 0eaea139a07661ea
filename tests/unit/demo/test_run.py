"""The demo's frame: its commands, their failures, and when a stage starts afresh."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from megatron_hgpt.demo import assets, run


def test_a_command_gets_its_environment_and_gives_its_output() -> None:
    result = run.call(["sh", "-c", "echo $COLOUR; pwd"], stdout=subprocess.PIPE, COLOUR="two words")
    assert result.stdout.splitlines() == ["two words", str(run.ROOT)]


def test_a_failed_step_ends_the_demo_with_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(run.StepError, match=r"exit status 3\): sh -c exit 3"):
        run.call(["sh", "-c", "exit 3"])
    monkeypatch.setattr(run, "build_assets", lambda *args, **options: run.call(["sh", "-c", "exit 3"]))
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    assert run.run(parser.parse_args(["--output", str(tmp_path)])) == 3
    assert capsys.readouterr().err == "step failed (exit status 3): sh -c exit 3\n"


def test_a_stage_starts_afresh_when_its_configuration_changed(tmp_path: Path) -> None:
    def write(overrides: list[str]) -> Path:
        return run.write_run_config(tmp_path, "tiny", "stage2", {}, overrides)

    path = write([])
    assert yaml.safe_load(path.read_text())["checkpoint"] == {"init_from": [str(tmp_path / "stage1")]}
    (tmp_path / "stage2" / "metrics.jsonl").write_text("kept")
    write([])
    assert (tmp_path / "stage2" / "metrics.jsonl").exists()
    write(["training.num_steps=7"])
    assert not (tmp_path / "stage2" / "metrics.jsonl").exists()


def test_every_evaluated_split_is_one_of_the_assets() -> None:
    assert list(run.SPLITS.values()) == ["train", "test", "wordings"]


def test_the_thread_count_is_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), assets._one_thread():
        assert torch.get_num_threads() == 1
        _ = 1 / 0
    assert torch.get_num_threads() == before
