from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest

from megatron_hgpt.checkpoint import SavedCheckpoint
from megatron_hgpt.hooks.console import ConsoleHook
from megatron_hgpt.hooks.figures import duration, losses
from megatron_hgpt.hooks.metrics import MetricsHook
from megatron_hgpt.rounding import file_size


@pytest.fixture
def lines(caplog, monkeypatch):
    """The lines so far, without a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO, logger="megatron_hgpt")
    return lambda: [record.getMessage() for record in caplog.records]


def _hooks(**options) -> list:
    metrics = MetricsHook()
    return [metrics, ConsoleHook(metrics=metrics, **options)]


def test_lines_at_the_interval_and_at_both_ends(make_state, run_steps, lines) -> None:
    run_steps(_hooks(interval_steps=4), make_state(total_steps=9), last=9, finish=False)
    assert [line.split(":")[0] for line in lines()] == [f"step {step}/9" for step in (1, 4, 8, 9)]
    expected = (
        "step 4/9: loss 1.0000 (comprehension 0.7500, generation 1.2500), lr 1.00e-03, adapter lr 1.00e-04, "
        "grad norm 0.500, 2,000 tokens/s, "
    )
    assert lines()[1].startswith(expected)
    assert re.fullmatch(r"\d+\.\d s left", lines()[1].removeprefix(expected))
    assert "left" not in lines()[-1]


def test_the_time_left_follows_the_pace_of_the_last_steps(make_state, make_record, lines, monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr("megatron_hgpt.hooks.console.time.perf_counter", lambda: now)
    console, state = _hooks(interval_steps=1)[1], make_state(total_steps=300, step=100)
    console.on_fit_start(state)
    for step in range(101, 201):
        now += 9.0 if step < 140 else 3.0  # a slow start is forgotten after 50 steps
        state.step = step
        console.on_step_end(state, make_record(step))
    assert lines()[0].endswith(", 29 min 51 s left")  # 199 steps of 9 s
    assert lines()[-1].endswith(", 5 min 00 s left")  # 100 steps of 3 s


def test_validation_checkpoint_and_summary(make_state, run_steps, make_validation, lines) -> None:
    hooks, state = _hooks(interval_steps=100), make_state(stage="stage3_joint")
    state.config.training.stage = state.stage
    run_steps(hooks, state, last=4, finish=False)
    saved = SavedCheckpoint(path=Path("runs/my run/step_00000004"), num_bytes=12_345_678, save_time_s=0.42)
    state.sample_counts = {"truncated": 2, "skipped/unreadable_image": 1}
    for hook in hooks:
        hook.on_validation(state, make_validation(2, 3.0))
        hook.on_validation(state, make_validation(4, 2.0))
        hook.on_checkpoint_saved(state, saved)
    for hook in hooks:
        hook.on_fit_end(state)
    shown = [re.sub(r"in \d+\.\d s", "in T s", line) for line in lines() if not line.startswith("step")]
    assert shown == [
        "validation at step 2: loss 3.0000 (comprehension 2.5000 on 12, generation 3.5000 on 8), 1.2 s",
        "validation at step 4: loss 2.0000 (comprehension 1.5000 on 12, generation 2.5000 on 8), 1.2 s",
        "checkpoint saved: runs/my run/step_00000004 (12 MB, 0.4 s)",
        "stage3_joint is done: 4 steps in T s, 2,000 tokens/s",
        "  loss        4.0000 -> 1.0000",
        "  validation  3.0000 -> 2.0000, best 2.0000 at step 4",
        "  samples     2 truncated to model.max_seq_length, 1 skipped (unreadable_image)",
        "  checkpoint  runs/my run/step_00000004",
        "  try it      hgpt generate --checkpoint 'runs/my run/step_00000004' --image PICTURE "
        '--question "What does it show?"',
    ]


def test_a_stopped_stage_says_how_to_go_on(make_state, run_steps, lines) -> None:
    run_steps(_hooks(), make_state(total_steps=9), last=4)
    assert "stage2 stopped at step 4 of 9: 4 steps" in lines()[-3]
    assert lines()[-1] == "  next        start the same command again to go on"


def test_a_run_with_nothing_left_to_do_says_so_and_how_to_go_on(make_state, run_steps, make_validation, lines) -> None:
    run_steps(_hooks(), make_state(), last=4, finish=False)
    hooks, state = _hooks(), make_state(step=4)
    hooks[0].on_validation(state, make_validation(4, 5.8))
    run_steps(hooks, state, last=4)
    assert lines()[-5] == ("stage2: nothing to do: 4 of 4 steps are done; raise training.num_steps or num_epochs")
    assert lines()[-4:-2] == ["  loss        4.0000 -> 1.0000", "  validation  5.8000 at step 4"]
    assert not any("tokens/s" in line for line in lines()[-5:])


def test_one_step(make_state, run_steps, lines) -> None:
    run_steps(_hooks(), make_state(total_steps=1), last=1)
    assert re.fullmatch(r"stage2 is done: 1 step in .*", lines()[1])
    assert lines()[2] == "  loss        4.0000"


def test_a_stage_before_the_last_names_the_next_one(make_state, run_steps, lines) -> None:
    state = make_state(stage="stage1_generation")
    state.config.training.stage = state.stage
    run_steps(_hooks(), state, last=4)
    assert lines()[-2].startswith("  try it") and lines()[-2].endswith("--draw drawn.png")
    assert lines()[-1].startswith("  next stage  'checkpoint.init_from=[")


def test_only_the_writer_speaks(make_state, run_steps, make_validation, lines) -> None:
    hooks, state = _hooks(), make_state(is_writer=False)
    run_steps(hooks, state, last=4)
    hooks[1].on_validation(state, make_validation(4))
    hooks[1].on_checkpoint_saved(state, SavedCheckpoint(path=Path("x"), num_bytes=1, save_time_s=1.0))
    assert lines() == []


def test_bar_on_a_terminal(make_state, run_steps, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run_steps(_hooks(), make_state(step=2), last=4)
    error = capsys.readouterr().err
    assert "stage2: 100%" in error and "4/4" in error and "loss 1.0000" in error
    run_steps(_hooks(), make_state(is_writer=False), last=4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0 s"), (59.9, "59.9 s"), (59.97, "1 min 00 s"), (3599.6, "1 h 00 min"), (7260.0, "2 h 01 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_and_losses() -> None:
    assert [file_size(n) for n in (40_000, 9_940_000, 12_000_000, 2_100_000_000)] == [
        "0.0 MB", "9.9 MB", "12 MB", "2.1 GB",
    ]  # fmt: skip
    assert losses(1.0, {"comprehension": 1.0}) == "1.0000"
    assert losses(1.0, {"comprehension": 1.0}, {"comprehension": 3}) == "1.0000 (comprehension 1.0000 on 3)"
