from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.config import RunConfig
from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState, ValidationRecord


@pytest.fixture
def make_state(tmp_path: Path) -> Callable[..., TrainState]:
    def make(**changes: Any) -> TrainState:
        values = {"step": 0, "total_steps": 4, "stage": "stage2", "is_writer": True} | changes
        return TrainState(output_dir=tmp_path, config=RunConfig(), model=None, **values)

    return make


def _record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "loss": 4.0 / step,
        "loss_per_task": {"comprehension": 3.0 / step, "generation": 5.0 / step},
        "num_supervised_tokens": 60,
        "num_tokens": 200,
        "num_samples": 2,
        "padding_share": 0.25,
        "learning_rates": {"default": 1e-3, "adapter": 1e-4},
        "grad_norm": 0.5,
        "step_time_s": 0.1,
        "tokens_per_s": 2000.0,
    }
    return StepRecord(step=step, **(values | changes))


@pytest.fixture
def make_record() -> Callable[..., StepRecord]:
    return _record


@pytest.fixture
def make_validation() -> Callable[..., ValidationRecord]:
    def make(step: int, loss: float = 2.0) -> ValidationRecord:
        return ValidationRecord(
            step=step,
            loss=loss,
            loss_per_task={"comprehension": loss - 0.5, "generation": loss + 0.5},
            num_samples_per_task={"comprehension": 12, "generation": 8},
            num_tokens=90,
            time_s=1.25,
        )

    return make


@pytest.fixture
def run_steps() -> Callable[..., None]:
    """Drive hooks over the steps after `state.step` as the trainer does, up to and including `last`."""

    def run(hooks: list[Hook], state: TrainState, *, last: int, finish: bool = True, **changes: Any) -> None:
        for hook in hooks:
            hook.on_fit_start(state)
        for step in range(state.step + 1, last + 1):
            state.step = step
            for hook in hooks:
                hook.on_step_end(state, _record(step, **changes))
        for hook in hooks if finish else []:
            hook.on_fit_end(state)

    return run
