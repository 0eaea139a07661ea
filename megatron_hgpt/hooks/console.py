"""Progress on the console of the one writing rank: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState

logger = logging.getLogger(__name__)


class ConsoleHook(Hook):
    """tqdm bar when stderr is a terminal and `progress_bar` is set; else about `num_log_lines` log lines per stage."""

    def __init__(self, *, progress_bar: bool = True, num_log_lines: int = 20) -> None:
        self.progress_bar = progress_bar
        self.num_log_lines = num_log_lines
        self._bar: tqdm | None = None
        self._open = ExitStack()

    def on_fit_start(self, state: TrainState) -> None:
        """Open the bar where the run resumes."""
        if state.is_writer and self.progress_bar and sys.stderr.isatty():
            self._open.enter_context(logging_redirect_tqdm())  # log lines go above the bar, not through it
            self._bar = tqdm(total=state.total_steps, initial=state.step, desc=state.stage, unit="step")
            self._open.callback(self._bar.close)

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """Move the bar, or log a line when one is due."""
        if not state.is_writer:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(_figures(record), refresh=False)
            self._bar.update()
        elif state.is_due(state.total_steps // self.num_log_lines):
            logger.info("%s step %d/%d: %s", state.stage, record.step, state.total_steps, _figures(record))

    def on_fit_end(self, state: TrainState) -> None:
        """Close the bar."""
        self._open.close()

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Close the bar so that the traceback starts on a line of its own."""
        self._open.close()


def _figures(record: StepRecord) -> str:
    rates = ", ".join(f"{rate:.2e}" for rate in record.learning_rates.values())
    return f"loss {record.loss:.4f}, lr {rates}, grad norm {record.grad_norm:.3f}, {record.tokens_per_s:,.0f} tokens/s"
