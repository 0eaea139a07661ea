"""Progress on the console of the one writing rank: a bar on a terminal, lines in a log file, a summary at the end."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_hgpt.hooks.base import Anomaly, Hook, StepRecord, TrainState, ValidationRecord
from megatron_hgpt.hooks.figures import duration, losses
from megatron_hgpt.rounding import file_size, plural
from megatron_hgpt.samples import Task
from megatron_hgpt.stages import resolve_stage

if TYPE_CHECKING:
    from megatron_hgpt.checkpoint import SavedCheckpoint
    from megatron_hgpt.hooks.metrics import MetricsHook

logger = logging.getLogger(__name__)


class ConsoleHook(Hook):
    """A line every `interval_steps` steps, or a bar where stderr is a terminal and `progress_bar` is set.

    Validations, checkpoints and the summary of the stage are lines in either case.

    Args:
        metrics: whose summary of the stage is shown; its `on_fit_end` has to come first.
        interval_steps: optimizer steps between lines; the first (also after a resume) and the last always get one.
        progress_bar: whether a terminal gets a bar.
    """

    def __init__(self, *, metrics: MetricsHook, interval_steps: int = 10, progress_bar: bool = True) -> None:
        self.metrics = metrics
        self.interval_steps = interval_steps
        self.progress_bar = progress_bar
        self._bar: tqdm | None = None
        self._open = ExitStack()
        self._ends_s: deque[float] = deque(maxlen=51)
        """When the last steps ended: the pace of the last 50, with validations and saves between them."""
        self._checkpoint: Path | None = None
        self._is_idle = False
        """Whether the checkpoint that this process resumed from is of the last step already."""

    def on_fit_start(self, state: TrainState) -> None:
        """Open the bar where the run resumes."""
        self._is_idle = state.step >= state.total_steps
        self._ends_s.append(time.perf_counter())
        if state.is_writer and self.progress_bar and sys.stderr.isatty():
            self._open.enter_context(logging_redirect_tqdm())  # log lines go above the bar, not through it
            self._bar = tqdm(total=state.total_steps, initial=state.step, desc=state.stage, unit="step")
            self._open.callback(self._bar.close)

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """Move the bar, or log a line when one is due."""
        if not state.is_writer:
            return
        self._ends_s.append(time.perf_counter())
        if self._bar is not None:
            self._bar.set_postfix_str(_figures(record), refresh=False)
            self._bar.update()
        elif state.is_due(self.interval_steps) or len(self._ends_s) == 2:  # the first step after a resume
            left = f", {duration(self._seconds_left(state))} left" if record.step < state.total_steps else ""
            logger.info("step %d/%d: %s%s", record.step, state.total_steps, _figures(record), left)

    def on_anomaly(self, state: TrainState, anomaly: Anomaly) -> None:
        """Move the bar back where training went back."""
        if self._bar is not None and anomaly.action == "rollback":
            self._bar.n = state.step
            self._bar.refresh()

    def on_validation(self, state: TrainState, record: ValidationRecord) -> None:
        """Log the held-out losses."""
        if state.is_writer:
            figures = losses(record.loss, record.loss_per_task, record.num_samples_per_task)
            logger.info("validation at step %d: loss %s, %s", record.step, figures, duration(record.time_s))

    def on_checkpoint_saved(self, state: TrainState, checkpoint: SavedCheckpoint) -> None:
        """Log where it is."""
        self._checkpoint = checkpoint.path
        if state.is_writer:
            size, seconds = file_size(checkpoint.num_bytes), duration(checkpoint.save_time_s)
            logger.info("checkpoint saved: %s (%s, %s)", checkpoint.path, size, seconds)

    def on_fit_end(self, state: TrainState) -> None:
        """Close the bar and log the summary of the stage."""
        self._open.close()
        if state.is_writer and self.metrics.summary:
            for line in summary_lines(state, self.metrics.summary, self._checkpoint, is_idle=self._is_idle):
                logger.info("%s", line)

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Close the bar so that the traceback starts on a line of its own."""
        self._open.close()

    def _seconds_left(self, state: TrainState) -> float:
        pace = (self._ends_s[-1] - self._ends_s[0]) / (len(self._ends_s) - 1)
        return pace * (state.total_steps - state.step)


def _figures(record: StepRecord) -> str:
    rates = f"lr {record.learning_rates['default']:.2e}"
    rates += "".join(
        f", {name} lr {rate:.2e}"
        for name, rate in record.learning_rates.items()
        if rate != record.learning_rates["default"]
    )
    return (
        f"loss {losses(record.loss, record.loss_per_task)}, {rates}, grad norm {record.grad_norm:.3f}, "
        f"{record.tokens_per_s:,.0f} tokens/s"
    )


def summary_lines(
    state: TrainState, summary: dict[str, Any], checkpoint: Path | None, *, is_idle: bool = False
) -> list[str]:
    """The summary of a stage: one headline and indented lines below it.

    Args:
        state: at the end.
        summary: of `metrics.summarise_stage`.
        checkpoint: the newest one that this process saved.
        is_idle: whether all steps were done before this process started.
    """
    is_done = state.step >= state.total_steps
    head = f"{state.stage} is done" if is_done else f"{state.stage} stopped at step {state.step} of {state.total_steps}"
    rate = summary["tokens_per_s"]
    speed = "" if rate is None else f", {rate:,.0f} tokens/s"
    took = f"{plural(summary['steps'], 'step')} in {duration(summary['wall_s'])}{speed}"
    if is_idle:
        head = f"{state.stage}: nothing to do"
        took = f"{state.step:,} of {state.total_steps:,} steps are done; raise training.num_steps or num_epochs"
    lines = [f"{head}: {took}"]
    rows = {"loss": _course(summary["first_loss"], summary["last_loss"])}
    if "last_validation_loss" in summary:
        first, last = summary["first_validation_loss"], summary["last_validation_loss"]
        best, step = summary["best_validation_loss"], summary["best_validation_step"]
        rows["validation"] = _course(first, last) + ("" if first == last == best else f", best {_figure(best)}")
        rows["validation"] += f" at step {step:,}"
    if counts := _sample_counts(state.sample_counts):
        rows["samples"] = counts
    if "anomalies" in summary:
        done = {"skip": "updates left out", "rollback": "rollbacks", "warn": "loss spikes"}
        counts = ", ".join(f"{count} {done[action]}" for action, count in summary["anomalies"].items())
        rows["anomalies"] = f"{counts}: {state.output_dir / 'anomalies.jsonl'}"
    if checkpoint is not None:
        rows["checkpoint"] = str(checkpoint)
    if is_done:
        rows |= _what_next(state, checkpoint or state.output_dir)
    else:
        rows["next"] = "start the same command again to go on"
    return lines + [f"  {name:<12}{text}" for name, text in rows.items()]


def _sample_counts(counts: dict[str, int]) -> str:
    skipped = {name.removeprefix("skipped/"): n for name, n in counts.items() if name.startswith("skipped/")}
    parts = [f"{counts['truncated']:,} truncated to model.max_seq_length"] if counts.get("truncated") else []
    parts += [f"{n:,} skipped ({reason})" for reason, n in skipped.items()]
    return ", ".join(parts)


def _what_next(state: TrainState, trained: Path) -> dict[str, str]:
    draws = Task.COMPREHENSION not in resolve_stage(state.config.training).tasks
    ask = '--question "Reconstruct the image." --draw drawn.png' if draws else '--question "What does it show?"'
    rows = {"try it": f"hgpt generate --checkpoint {shlex.quote(str(trained))} --image PICTURE {ask}"}
    if not state.stage.startswith("stage3"):
        rows["next stage"] = f"'checkpoint.init_from=[{trained}]' with another training.stage and output_dir"
    return rows


def _course(first: float | None, last: float | None) -> str:
    return _figure(first) if first == last else f"{_figure(first)} -> {_figure(last)}"


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
