"""metrics.jsonl (one JSON object per logged step) and summary.json (one per stage), both safe against a kill.

metrics.jsonl holds each step once: after a resume, the lines of steps that will run again are dropped first.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from megatron_hgpt.errors import DataError
from megatron_hgpt.files import write_atomic
from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState

logger = logging.getLogger(__name__)


class MetricsHook(Hook):
    """Writes both files and logs the one-line summary of the stage.

    Args:
        interval_steps: optimizer steps between lines; the first and the last step always get one.
    """

    def __init__(self, *, interval_steps: int = 1) -> None:
        self.interval_steps = interval_steps
        self._start_s = 0.0

    def on_fit_start(self, state: TrainState) -> None:
        """Keep the lines of the steps that are behind the resumed state, drop the others."""
        if not state.is_writer:
            return
        path = state.output_dir / "metrics.jsonl"
        kept = [r for r in read_metrics(path) if r["step"] <= state.step] if path.exists() else []
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
        # A finished stage's summary must not outlive a new start of that stage.
        (state.output_dir / "summary.json").unlink(missing_ok=True)
        self._start_s = time.perf_counter() - (kept[-1].get("elapsed_s", 0.0) if kept else 0.0)

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """Append one line and flush it."""
        if not (state.is_writer and state.is_due(self.interval_steps)):
            return
        if not math.isfinite(record.loss):
            logger.warning("step %d: the loss is %s", record.step, record.loss)
        line = _as_json(state.stage, record, elapsed_s=time.perf_counter() - self._start_s)
        with open(state.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_fit_end(self, state: TrainState) -> None:
        """Write summary.json and log it as one line."""
        if not state.is_writer:
            return
        records = read_metrics(state.output_dir / "metrics.jsonl")
        summary = summarise_stage(
            state.stage, records, num_steps=state.step, wall_s=time.perf_counter() - self._start_s
        )
        write_atomic(state.output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        logger.info(
            "%s: %d steps, loss %s -> %s, %.1f s, %s tokens/s",
            state.stage,
            state.step,
            _figure(summary["first_loss"], ".4f"),
            _figure(summary["last_loss"], ".4f"),
            summary["wall_s"],
            _figure(summary["tokens_per_s"], ",.0f"),
        )


def summarise_stage(stage: str, records: list[dict[str, Any]], *, num_steps: int, wall_s: float) -> dict[str, Any]:
    """The content of summary.json.

    `first_loss` and `last_loss` are those of the first and last logged step; `tokens_per_s` is tokens by time inside
    the logged steps; `wall_s` also holds checkpoints and samples, and the time of runs that this one resumed.
    """
    step_time_s = sum(record["step_time_s"] for record in records)
    return {
        "stage": stage,
        "steps": num_steps,
        "first_loss": records[0]["loss"] if records else None,
        "last_loss": records[-1]["loss"] if records else None,
        "wall_s": round(wall_s, 3),
        "tokens_per_s": round(sum(r["num_tokens"] for r in records) / step_time_s, 1) if step_time_s else None,
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; an unfinished last line (the writer was killed) is left out.

    Raises:
        DataError: the file is missing, or a line before the last is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give the output folder of a training run") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or unfinished
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record["step"], int)):
                raise ValueError(f"no integer 'step' in {line[:60]!r}")
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a step record ({error}); delete that line") from error
        records.append(record)
    return records


def _as_json(stage: str, record: StepRecord, *, elapsed_s: float) -> dict[str, Any]:
    rates = {"lr" if name == "default" else f"{name}_lr": rate for name, rate in record.learning_rates.items()}
    line = {
        "step": record.step,
        "stage": stage,
        "loss": record.loss,
        **{f"loss_{task}": loss for task, loss in record.loss_per_task.items()},
        **rates,
        "grad_norm": record.grad_norm,
        "tokens_per_s": round(record.tokens_per_s, 1),
        "num_supervised_tokens": record.num_supervised_tokens,
        "num_tokens": record.num_tokens,
        "num_samples": record.num_samples,
        "padding_share": round(record.padding_share, 4),
        "step_time_s": round(record.step_time_s, 6),
        "elapsed_s": round(elapsed_s, 3),
    }
    # JSON has no NaN or infinity: null stands for them.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def _figure(value: float | None, spec: str) -> str:
    return "not finite" if value is None else format(value, spec)
