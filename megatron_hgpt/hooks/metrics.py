"""metrics.jsonl (one JSON object per logged step), validation.jsonl (one per validation), anomalies.jsonl (one per
abnormal step) and summary.json (one per stage), all safe against a kill; none of them stops a run by a full disk.

The first two hold each step once, in order: after a resume and after a rollback, the lines of steps that will run again
are dropped first. The first line after a rollback says from which step it came (`rolled_back_from`); what was seen
there stays in anomalies.jsonl, which is only ever appended to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_hgpt.errors import DataError, reason_of
from megatron_hgpt.files import write_atomic
from megatron_hgpt.hooks.base import Anomaly, Hook, StepRecord, TrainState, ValidationRecord
from megatron_hgpt.hooks.tolerance import Tolerance


class MetricsHook(Hook):
    """Writes the four files.

    Args:
        interval_steps: optimizer steps between lines; the first and the last step always get one.
    """

    def __init__(self, *, interval_steps: int = 1) -> None:
        self.interval_steps = interval_steps
        self.summary: dict[str, Any] = {}
        """The content of summary.json, once the stage has ended."""
        self._start_s = 0.0
        self._rolled_back_from: int | None = None
        self._anomalies: Counter[str] = Counter()
        self._tolerance = Tolerance()
        self._last_kept: int | None = None
        """The step whose later lines are still to be dropped from both files."""

    def on_fit_start(self, state: TrainState) -> None:
        """Keep the lines of the steps that are behind the resumed state, drop the others."""
        if not state.is_writer:
            return
        kept = _up_to(state.output_dir / "metrics.jsonl", state.step)
        self._go_back(state)
        # A finished stage's summary must not outlive a new start of that stage.
        with self._tolerance.writing(state.output_dir / "summary.json"):
            (state.output_dir / "summary.json").unlink(missing_ok=True)
        self._start_s = time.perf_counter() - (kept[-1].get("elapsed_s", 0.0) if kept else 0.0)

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """Append one line and flush it; an abnormal step always gets one, and the first after a rollback."""
        is_special = record.anomaly is not None or self._rolled_back_from is not None
        if not (state.is_writer and (is_special or state.is_due(self.interval_steps))):
            return
        line = _as_json(state.stage, record, elapsed_s=time.perf_counter() - self._start_s)
        if self._rolled_back_from is not None:
            line["rolled_back_from"], self._rolled_back_from = self._rolled_back_from, None
        self._append(state, "metrics.jsonl", line)

    def on_anomaly(self, state: TrainState, anomaly: Anomaly) -> None:
        """Append one line to anomalies.jsonl; after a rollback drop the lines of the steps that run again."""
        if not state.is_writer:
            return
        self._anomalies[anomaly.action] += 1
        self._append(state, "anomalies.jsonl", {"stage": state.stage, **dataclasses.asdict(anomaly)})
        if anomaly.action == "rollback":
            self._go_back(state)
            self._rolled_back_from = anomaly.step

    def on_validation(self, state: TrainState, record: ValidationRecord) -> None:
        """Append one line to validation.jsonl and flush it."""
        if not state.is_writer:
            return
        line = {
            "step": record.step,
            "stage": state.stage,
            "loss": record.loss,
            **{f"loss_{task}": loss for task, loss in record.loss_per_task.items()},
            **{f"num_samples_{task}": count for task, count in record.num_samples_per_task.items()},
            "num_supervised_tokens": record.num_tokens,
            "time_s": round(record.time_s, 3),
        }
        self._append(state, "validation.jsonl", _finite(line))

    def on_fit_end(self, state: TrainState) -> None:
        """Write summary.json."""
        if not state.is_writer:
            return
        self.summary = summarise_stage(
            state.stage,
            _up_to(state.output_dir / "metrics.jsonl", state.step),
            num_steps=state.step,
            wall_s=time.perf_counter() - self._start_s,
            validations=read_validations(state.output_dir),
        )
        if self._anomalies:
            self.summary["anomalies"] = dict(self._anomalies)
        with self._tolerance.writing(state.output_dir / "summary.json"):
            write_atomic(state.output_dir / "summary.json", json.dumps(self.summary, indent=2) + "\n")

    def _append(self, state: TrainState, name: str, line: dict[str, Any]) -> None:
        """Add a line to a file, if it can be written."""
        with self._tolerance.writing(state.output_dir / name):
            self._drop_later_steps(state.output_dir)
            _append(state.output_dir / name, line)

    def _go_back(self, state: TrainState) -> None:
        """Drop what both files say of steps behind the current one; where that fails, before the next line."""
        self._last_kept = state.step
        with self._tolerance.writing(state.output_dir / "metrics.jsonl"):
            self._drop_later_steps(state.output_dir)

    def _drop_later_steps(self, folder: Path) -> None:
        if self._last_kept is None:
            return
        validations = folder / "validation.jsonl"
        if validations.exists() and not _drop_steps_after(validations, self._last_kept):
            validations.unlink()
        _drop_steps_after(folder / "metrics.jsonl", self._last_kept)
        self._last_kept = None


def _up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of the steps up to `step`; none where there is no file."""
    return [record for record in read_metrics(path) if record["step"] <= step] if path.exists() else []


def _drop_steps_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the records up to `step`, in the file and as the result."""
    kept = _up_to(path, step)
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _append(path: Path, line: dict[str, Any]) -> None:
    """Add the whole line, or on a full disk nothing: half of one would spoil the next.

    Raises:
        OSError: it cannot be written.
    """
    content = (json.dumps(line) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def summarise_stage(
    stage: str,
    records: list[dict[str, Any]],
    *,
    num_steps: int,
    wall_s: float,
    validations: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The content of summary.json.

    `first_loss` and `last_loss` are those of the first and last logged step; `tokens_per_s` is tokens by time inside
    the logged steps; `wall_s` also holds validations, checkpoints and samples, and the time of runs that this one
    resumed. The fields of the validation loss are there only where there was a validation.
    """
    step_time_s = sum(record["step_time_s"] for record in records)
    summary = {
        "stage": stage,
        "steps": num_steps,
        "first_loss": records[0]["loss"] if records else None,
        "last_loss": records[-1]["loss"] if records else None,
        "wall_s": round(wall_s, 3),
        "tokens_per_s": round(sum(r["num_tokens"] for r in records) / step_time_s, 1) if step_time_s else None,
    }
    if validations:
        best = min(validations, key=lambda record: math.inf if record["loss"] is None else record["loss"])
        summary |= {
            "first_validation_loss": validations[0]["loss"],
            "last_validation_loss": validations[-1]["loss"],
            "best_validation_loss": best["loss"],
            "best_validation_step": best["step"],
        }
    return summary


def read_validations(folder: Path) -> list[dict[str, Any]]:
    """All records of a run's validation.jsonl, as `read_metrics`; none where the run has no such file."""
    path = folder / "validation.jsonl"
    return read_metrics(path) if path.exists() else []


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; an unfinished last line (the writer was killed) is left out.

    Raises:
        DataError: the file is missing, or a line before the last is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({reason_of(error)}); give the output folder of a training run"
        ) from error
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
    if record.anomaly is not None:
        line |= {"anomaly": record.anomaly.kind, "action": record.anomaly.action}
    return _finite(line)


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: null stands for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
