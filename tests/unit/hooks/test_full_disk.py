"""A disk that fills up while training goes on costs figures and a warning for each file, and nothing else."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from megatron_hgpt.config import TimeoutsConfig
from megatron_hgpt.hooks.base import Anomaly, TrainState
from megatron_hgpt.hooks.image_samples import ImageSamplesHook
from megatron_hgpt.hooks.metrics import MetricsHook, read_metrics
from megatron_hgpt.hooks.tensorboard import TensorBoardHook
from megatron_hgpt.hooks.watchdog import WatchdogHook
from tests.disks import small_disk

ANOMALY = Anomaly(step=2, kind="spike", action="warn", text="high")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 KiB."""
    with small_disk(tmp_path / "small", "128k") as place:
        yield place


def fill(disk: Path) -> Path:
    """Leave not a byte, also not in the last block of a file: none of them may grow."""
    ballast = disk / "ballast"
    with ballast.open("ab") as file:
        file.write(bytes(shutil.disk_usage(disk).free))
    return ballast


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_the_files_of_a_run(
    make_state, make_record, make_validation, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state: TrainState = dataclasses.replace(make_state(), output_dir=disk, total_steps=100)
    hook = MetricsHook()
    hook.on_fit_start(state)
    ballast, steps = fill(disk), range(1, 41)
    for step in steps:  # the block that metrics.jsonl has is full after some ten lines, in the middle of one
        state.step = step
        hook.on_step_end(state, make_record(step))
        hook.on_validation(state, make_validation(step))
    hook.on_anomaly(state, ANOMALY)
    reason = "cannot be written (No space left on device): training goes on without it"
    expected = [f"{disk / name} {reason}" for name in ("metrics.jsonl", "validation.jsonl", "anomalies.jsonl")]
    assert sorted(warnings_of(caplog)) == sorted(expected)
    ballast.unlink()
    state.step = 41
    hook.on_step_end(state, make_record(41))
    assert warnings_of(caplog)[3:] == [f"{disk / 'metrics.jsonl'} can be written again"]
    kept = [record["step"] for record in read_metrics(disk / "metrics.jsonl")]
    assert kept == [*range(1, len(kept)), 41] and len(kept) < 41
    fill(disk)
    hook.on_fit_end(state)
    assert hook.summary["steps"] == 41 and not (disk / "summary.json").exists()
    assert warnings_of(caplog)[4:] == [f"{disk / 'summary.json'} {reason}"]


def test_lines_of_steps_that_run_again_go_once_there_is_room(make_state, make_record, disk: Path) -> None:
    state: TrainState = dataclasses.replace(make_state(), output_dir=disk, total_steps=100)
    hook = MetricsHook()
    hook.on_fit_start(state)
    for step in (1, 2, 3):
        state.step = step
        hook.on_step_end(state, make_record(step))
    ballast, state.step = fill(disk), 1
    hook.on_anomaly(state, dataclasses.replace(ANOMALY, action="rollback", step=3))
    assert [record["step"] for record in read_metrics(disk / "metrics.jsonl")] == [1, 2, 3]
    ballast.unlink()
    state.step = 2
    hook.on_step_end(state, make_record(2))
    assert [record["step"] for record in read_metrics(disk / "metrics.jsonl")] == [1, 2]


def test_tensorboard_and_pictures(
    make_state, make_record, disk: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("tensorboard")
    import threading

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    state: TrainState = dataclasses.replace(make_state(), output_dir=disk, total_steps=4000)
    board = TensorBoardHook()
    pictures = ImageSamplesHook(
        interval_steps=1, sample_images=lambda _: [("a", Image.new("RGB", (8, 8)))], tensorboard=board
    )
    board.on_fit_start(state)
    fill(disk)
    for step in range(1, 400):
        state.step = step
        board.on_step_end(state, make_record(step))
        if step == 200:
            pictures.on_step_end(state, make_record(step))
            time.sleep(0.1)
    board.on_fit_end(state)
    reason = "cannot be written (No space left on device): training goes on without it"
    assert sorted(warnings_of(caplog)) == [f"{disk / name} {reason}" for name in ("samples", "tensorboard")]
    assert "Traceback" not in capfd.readouterr().err


def test_the_watchdog(make_state, disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    state: TrainState = dataclasses.replace(make_state(), output_dir=disk)
    fill(disk)
    (disk / "watchdog").touch()  # no folder can take its place
    hook = WatchdogHook(TimeoutsConfig(), rank=0, world_size=1, output_dir=disk)
    hook.start()
    hook.on_fit_start(state)
    assert hook._stacks is sys.__stderr__
    hook.stop()
    (line,) = warnings_of(caplog)
    assert line.startswith(f"{disk / 'watchdog' / 'rank_0.txt'} cannot be written (") and "training goes on" in line
