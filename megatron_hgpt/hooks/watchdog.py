"""Says where a rank stands when a step takes far longer than usual, before a collective times out."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import statistics
from collections import deque
from pathlib import Path
from typing import IO, TYPE_CHECKING

from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState, ValidationRecord

if TYPE_CHECKING:
    from megatron_hgpt.checkpoint import SavedCheckpoint

logger = logging.getLogger(__name__)


class WatchdogHook(Hook):
    """Dumps the stacks of all threads to <output_dir>/watchdog/rank_<rank>.txt when a step is overdue.

    faulthandler's own C thread writes the dump, so it works while Python is stuck inside a collective. The run goes
    on; a step that ends late is logged. Validation is not watched, and time spent saving does not count.

    Args:
        rank: of this process, for the file name.
        slow_factor: a step is overdue after this many times the median of the last 50.
        min_timeout_s: and never before this.
    """

    def __init__(self, *, rank: int = 0, slow_factor: float = 10.0, min_timeout_s: float = 60.0) -> None:
        self.rank = rank
        self.slow_factor = slow_factor
        self.min_timeout_s = min_timeout_s
        self._times_s: deque[float] = deque(maxlen=50)
        self._path: Path | None = None
        self._file: IO[str] | None = None

    @property
    def timeout_s(self) -> float | None:
        """Seconds after which a step is overdue; None until three steps have shown what is usual."""
        if len(self._times_s) < 3:
            return None
        return max(self.min_timeout_s, self.slow_factor * statistics.median(self._times_s))

    def on_fit_start(self, state: TrainState) -> None:
        """Open the dump file: faulthandler needs it open beforehand."""
        self._path = state.output_dir / "watchdog" / f"rank_{self.rank}.txt"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115  (lives as long as the run)

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """Log a step that was overdue, and watch the next one."""
        timeout_s = self.timeout_s
        if timeout_s is not None and record.step_time_s > timeout_s:
            logger.warning(
                "rank %d: step %d took %.1f s, the median is %.1f s; its stacks are in %s",
                self.rank,
                record.step,
                record.step_time_s,
                statistics.median(self._times_s),
                self._path,
            )
        self._times_s.append(record.step_time_s)
        self._watch()

    def on_validation_start(self, state: TrainState) -> None:
        """Validation may take as long as it likes."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def on_validation(self, state: TrainState, record: ValidationRecord) -> None:
        """Watch the next step."""
        self._watch()

    def on_checkpoint_saved(self, state: TrainState, checkpoint: SavedCheckpoint) -> None:
        """Time spent saving does not count."""
        self._watch()

    def on_fit_end(self, state: TrainState) -> None:
        """Stop watching; an empty dump file is removed, and the folder with the last of them."""
        if self._file is None or self._path is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._file = None
        if self._path.stat().st_size == 0:
            self._path.unlink()
            with contextlib.suppress(OSError):  # other ranks' dumps are still in it
                self._path.parent.rmdir()

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Stop watching."""
        self.on_fit_end(state)

    def _watch(self) -> None:
        if self._file is not None and self.timeout_s is not None:
            faulthandler.dump_traceback_later(self.timeout_s, file=self._file)
