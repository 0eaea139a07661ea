"""Says which rank a run waits for when it stands still, and ends it on every rank when that goes on too long.

A thread of each rank does it, so it works while the main thread is stuck in a collective, a read or a sleep. Every few
seconds the thread puts a beat (`hooks.beats`) into the process group's store; rank 0 reads them, and rank 1 where rank
0 is silent. A process that was stopped, or that holds Python's lock for good, does not beat, which names it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_hgpt.environment import write_error_file
from megatron_hgpt.errors import HungError
from megatron_hgpt.exit_status import ExitStatus
from megatron_hgpt.hooks.base import Hook, Phase, TrainState
from megatron_hgpt.hooks.beats import Beat, host_name, kill_silent, place_of, process_start, ranks_behind
from megatron_hgpt.hooks.figures import duration
from megatron_hgpt.hooks.tolerance import Tolerance

if TYPE_CHECKING:
    from megatron_hgpt.config import TimeoutsConfig

logger = logging.getLogger(__name__)

PEER_ERROR_S = 60.0
"""After an error of another rank: until a rank that waits for it ends too. The error itself is said within 30 s."""

_LAST_S = 10.0
"""Seconds for stacks and message of a process that ends; half of them for the stacks."""

_REMEDIES = {
    Phase.START: "look at the storage of the models and at the network between the machines",
    Phase.LOAD: "look at the storage of data.train, or raise data.num_workers",
    Phase.SAVE: "look at the storage of the checkpoints",
    Phase.VALIDATE: "look at the storage of data.validation",
}
_REMEDY = "look at that process and its machine; if it is only slow, raise timeouts.step_warning_s"


class WatchdogHook(Hook):
    """Watches one rank, and on the first one all of them, from `start` to `stop`.

    Args:
        timeouts: `step_warning_s`, `step_limit_s`, `start_s`, `save_s`.
        rank: of this process.
        world_size: processes of the run.
        output_dir: of the run. Stacks go to ``watchdog/rank_<rank>.txt`` in it once the run has begun; to stderr
            before, as the folder may be another run's until then.
    """

    def __init__(self, timeouts: TimeoutsConfig, *, rank: int, world_size: int, output_dir: Path) -> None:
        self.timeouts, self.rank, self.world_size = timeouts, rank, world_size
        self.path = output_dir / "watchdog" / f"rank_{rank}.txt"
        self.tick_s = min(5.0, timeouts.step_warning_s / 5)
        self._file: IO[str] | None = None
        """Open as long as the run: faulthandler needs it beforehand."""
        self._store: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watched = threading.get_ident()
        self._now = (0, 0, Phase.START)
        """Phases begun, steps completed, the phase."""
        self._beats: dict[int, Beat] = {}
        self._heard_s: dict[int, float] = {}
        """Rank -> when its beat was another one than before, by `_clock_s`."""
        self._clock_s = 0.0
        """Seconds that this process ran; the time in which it was stopped itself does not count against others."""
        self._begun_s = 0.0
        self._is_warned = self._is_dumped = False
        self._peer_error_s: float | None = None

    def start(self) -> None:
        """Watch this rank from now on; it is starting."""
        self._thread.start()

    def connect(self, store: Any) -> None:
        """Watch the other ranks as well.

        Args:
            store: a store of torch.distributed that no other thread uses.
        """
        if self.world_size > 1:
            self._store = store

    def stop(self) -> None:
        """Stop watching; an empty file of stacks is removed, and the folder with the last of them."""
        self._stop.set()
        self._thread.join(timeout=10.0)
        faulthandler.cancel_dump_traceback_later()
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # other ranks' stacks are still in the folder; the disk is full
            self._file.close()
            if self.path.stat().st_size == 0:
                self.path.unlink()
                self.path.parent.rmdir()
        self._file = None

    def on_fit_start(self, state: TrainState) -> None:
        """The folder is this run's."""
        with Tolerance().writing(self.path):  # stacks then go to stderr as before
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115
        # What was put off last would still go to stderr, should this thread hold Python's lock from now on.
        faulthandler.dump_traceback_later(self.timeouts.step_warning_s, file=self._stacks)

    def on_phase(self, state: TrainState, phase: Phase) -> None:
        """A new part of the work is progress."""
        self._now = (self._now[0] + 1, state.step, phase)

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Tell the other ranks, which may sit in a collective that this one will never join.

        What hangs here would also keep this process from ending, as a loader's thread does: it ends at once.
        """
        if isinstance(error, HungError):
            self._tell_end(str(error), [])
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set("watchdog/error", f"rank {self.rank}: {type(error).__name__}")

    def _watch(self) -> None:
        """The thread."""
        before_s, before, number = time.monotonic(), self._now, 0
        while not self._stop.wait(self.tick_s):
            now_s, number = time.monotonic(), number + 1
            self._clock_s += min(now_s - before_s, 2 * self.tick_s)
            before_s = now_s
            if self._now != before:
                before, self._begun_s = self._now, self._clock_s
            with contextlib.suppress(RuntimeError):  # the store went with the process that held it
                self._exchange(number)
            self._judge()
            self._dump_if_due()
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"watchdog/{self.rank}", "")

    @property
    def _idle_s(self) -> float:
        """Seconds since this rank's last progress."""
        return self._clock_s - self._begun_s

    def _limit_s(self) -> float:
        """Seconds without progress that end the run."""
        own = {
            Phase.START: self.timeouts.start_s,
            # The save itself gives up after `save_s`; this is for one that cannot even do that.
            Phase.SAVE: self.timeouts.save_s + self.timeouts.step_warning_s,
        }
        return own.get(self._now[2], self.timeouts.step_limit_s)

    def _warning_s(self) -> float:
        """Seconds without progress that are worth a line: of a phase with a limit of its own, half of that."""
        phase = self._now[2]
        has_own = phase in (Phase.START, Phase.SAVE)
        return max(self.timeouts.step_warning_s, self._limit_s() / 2 if has_own else 0.0)

    @property
    def _stacks(self) -> IO[str]:
        """What stacks are written to."""
        file = self._file or sys.__stderr__
        assert file is not None
        return file

    def _dump_if_due(self) -> None:
        """Write the stacks once when this rank stands still; faulthandler's own thread does, where this one cannot."""
        left_s = self._warning_s() - self._idle_s
        if left_s > 0:
            # Put off with every beat, so it comes only where there are no more.
            faulthandler.dump_traceback_later(self.timeouts.step_warning_s, file=self._stacks)
            self._is_dumped = False
        elif not self._is_dumped:
            self._is_dumped = True
            faulthandler.cancel_dump_traceback_later()
            self._dump()

    def _dump(self, wait_s: float = 0.0) -> None:
        """Write the stacks in a thread: what hangs may be the very disk that takes them, and this one has to judge."""
        writer = threading.Thread(target=self._write_stacks, name="watchdog's stacks", daemon=True)
        writer.start()
        writer.join(wait_s)

    def _write_stacks(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk; closed at the end of the run
            self._stacks.write(f"{time.strftime('%H:%M:%S')} {self._beat(0).describe(self.rank)}\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks)

    def _beat(self, number: int) -> Beat:
        progress, step, phase = self._now
        place, is_waiting = place_of(self._watched)
        pid = os.getpid()
        return Beat(
            number=number,
            progress=progress,
            step=step,
            phase=phase,
            place=place,
            is_waiting=is_waiting,
            host=host_name(),
            pid=pid,
            started=process_start(pid),
        )

    def _exchange(self, number: int) -> None:
        """Tell this rank's beat; hear those that this rank has to, and whether the run is to end.

        Raises:
            RuntimeError: the store is gone.
        """
        self._beats[self.rank] = self._beat(number)
        if self._store is None:
            return
        self._store.set(f"watchdog/{self.rank}", self._beats[self.rank].to_json())
        if self._store.check(["watchdog/end"]):
            end = json.loads(self._store.get("watchdog/end"))
            self._end(end["text"], {int(r): Beat.from_json(b) for r, b in end["silent"].items()})
        if self._peer_error_s is None and self._store.check(["watchdog/error"]):
            self._peer_error_s = self._clock_s
        if self.rank == 0 or (self.rank == 1 and self._is_silent(0)) or self._idle_s >= self._limit_s():
            self._hear(range(self.world_size))
        elif self.rank == 1:
            self._hear([0])

    def _hear(self, ranks: Collection[int]) -> None:
        """Read the beats of other ranks; of those that have not begun or have ended there is none."""
        for rank in set(ranks) - {self.rank}:
            key = f"watchdog/{rank}"
            text = self._store.get(key) if self._store.check([key]) else b""
            if not text:
                self._beats.pop(rank, None)
                continue
            beat = Beat.from_json(text)
            if rank not in self._beats or beat.number != self._beats[rank].number:
                self._heard_s[rank] = self._clock_s
            self._beats[rank] = beat

    def _is_silent(self, rank: int, after_s: float | None = None) -> bool:
        after_s = self.timeouts.step_warning_s if after_s is None else after_s
        return rank != self.rank and rank in self._beats and self._clock_s - self._heard_s[rank] >= after_s

    def _judge(self) -> None:
        """Warn once per standstill, say that it is over, and end the run at the limit."""
        silent = [rank for rank in self._beats if self._is_silent(rank)]
        speaks = self.rank == 0 or 0 in silent
        if self._peer_error_s is not None and min(self._clock_s - self._peer_error_s, self._idle_s) >= PEER_ERROR_S:
            self._tell_end("another rank ended with an error, and this one waited for it", silent)
        if self._idle_s < self._warning_s() and not silent:
            if self._is_warned and speaks:
                logger.warning("the run goes on, at step %d", self._now[1])
            self._is_warned = False
            return
        limit_s = self._limit_s()
        lost = [rank for rank in silent if self._is_silent(rank, self.timeouts.step_limit_s)]
        if speaks and (self._idle_s >= limit_s or lost):
            self._tell_end(f"{self._standstill(silent)}: the limit is reached", silent)
        elif self._idle_s >= limit_s + 3 * self.tick_s:  # nobody who watches them all is left; this one has by now
            silent = [rank for rank in self._beats if self._is_silent(rank, 2 * self.tick_s)]
            self._tell_end(f"{self._standstill(silent)}: the limit is reached", silent)
        elif speaks and not self._is_warned:
            self._is_warned = True
            self._warn(silent)

    def _warn(self, silent: Collection[int]) -> None:
        behind = ranks_behind(self._beats, silent)
        phase = self._beats[behind[0]].phase
        option, left_s = "step_limit_s", self._limit_s() - self._idle_s
        if silent:
            left_s = self.timeouts.step_limit_s - max(self._clock_s - self._heard_s[rank] for rank in silent)
        elif self._now[2] in (Phase.START, Phase.SAVE):
            option = "start_s" if self._now[2] is Phase.START else "save_s"
        logger.log(
            # Other ranks than the first show errors only.
            logging.WARNING if self.rank == 0 else logging.ERROR,
            "%s; stacks in %s; %s. In %s the run ends on every rank with exit status %d and can be started again "
            "(timeouts.%s)",
            self._standstill(silent),
            self.path.with_name(f"rank_{behind[0]}.txt" if not silent else "rank_*.txt"),
            _REMEDY if silent else _REMEDIES.get(phase, _REMEDY),
            duration(max(left_s, 0.0)),
            ExitStatus.HUNG,
            option,
        )

    def _standstill(self, silent: Collection[int]) -> str:
        """One sentence: since when, and whom the others wait for."""
        behind = ranks_behind(self._beats, silent)
        named = "; ".join(self._beats[rank].describe(rank, is_silent=bool(silent)) for rank in behind[:3])
        more = f" and {len(behind) - 3} more" if len(behind) > 3 else ""
        if silent:
            silence_s = max(self._clock_s - self._heard_s[rank] for rank in silent)
            return f"no sign of life for {duration(silence_s)} from {named}{more}: stopped, or its machine is lost"
        whom = "all ranks stand still" if len(behind) == len(self._beats) > 1 else "behind is"
        return f"no progress after step {self._now[1]} for {duration(self._idle_s)}: {whom} {named}{more}"

    def _tell_end(self, text: str, silent: Collection[int]) -> None:
        """Have every rank end, this one last: it may be the one that holds the store."""
        lost: Mapping[int, Beat] = {rank: self._beats[rank] for rank in silent}
        if self._store is not None:
            end = {"text": text, "silent": {rank: beat.to_json() for rank, beat in lost.items()}}
            with contextlib.suppress(RuntimeError):
                self._store.set("watchdog/end", json.dumps(end))
                time.sleep(2 * self.tick_s)
        self._end(text, lost)

    def _end(self, text: str, silent: Mapping[int, Beat]) -> None:
        """End this process, and those on its machine that cannot hear."""
        # Where even the message cannot be written, for instance to a pipe that nobody reads.
        last = threading.Timer(_LAST_S, os._exit, [ExitStatus.HUNG])
        last.daemon = True
        last.start()
        self._dump(wait_s=_LAST_S / 2)
        message = f"HungError: {text}; stacks in {self.path.parent}; start again to go on from the newest checkpoint"
        if self.rank == 0 or (self.rank == 1 and 0 in silent):
            logger.error("%s", message)
        write_error_file(message)
        kill_silent(silent, list(silent), host_name())
        logging.shutdown()
        os._exit(ExitStatus.HUNG)
