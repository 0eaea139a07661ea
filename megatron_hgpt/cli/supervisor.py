"""torchrun's agent with this project's answer to processes that end: which failures are started again, and when.

The agent starts the processes of this machine, meets the agents of the others, notices failures and nodes that come
and go, and starts everybody anew. What it lacks is here: exit statuses that no restart helps, back-off, progress as
the measure of patience, and time to save.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError

from megatron_hgpt.checkpoint.description import checkpoint_folders, publication_of, read_info
from megatron_hgpt.cli.frame import RANK_ERROR_DELAY_S
from megatron_hgpt.config import LaunchConfig
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.exit_status import ExitStatus
from megatron_hgpt.interruption import SECOND_CTRL_C_S

logger = logging.getLogger(__name__)

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit statuses of a process that a signal stopped, and that has saved."""
FINAL = (ExitStatus.USER_ERROR, ExitStatus.DIVERGED, *STOPPED)
"""Exit statuses that starting again does not help, or that somebody asked for."""
_AS_ASKED = (ExitStatus.FINISHED, *STOPPED, -signal.SIGTERM, -signal.SIGINT)
"""How processes end that are told to stop; by the signal itself before they train, with nothing to save."""
_ENDED = (ExitStatus.FINISHED, -signal.SIGTERM, -signal.SIGKILL)
"""How processes end that the agent itself ended after another one's failure; nothing of them explains it."""
_STATUS_KEY = "hgpt/exit_status"
_ASKED_KEY = "hgpt/asked_to_stop"
_LONGEST_BACKOFF_S = 300.0


class Patience:
    """Counts failures in a row without a newer checkpoint, and waits longer before each next try.

    Args:
        launch: its limits.
        checkpoints: the folder of step_* folders.
    """

    def __init__(self, launch: LaunchConfig, checkpoints: Path) -> None:
        self._launch, self._checkpoints = launch, checkpoints
        self._newest = self._newest_publication()
        self._failures = 0

    def _newest_publication(self) -> tuple[int, str]:
        """Number and name of what was published last: a run that went back publishes lower steps. (-1, "") of none."""
        with contextlib.suppress(OSError):
            numbers = [(publication_of(folder), folder.name) for folder in checkpoint_folders(self._checkpoints)]
            return max(((number, name) for number, name in numbers if number is not None), default=(-1, ""))
        return -1, ""

    def _place(self) -> str:
        """Where the processes will go on: the newest healthy checkpoint, or where there is none the newest."""
        names = []
        with contextlib.suppress(OSError):
            for folder in reversed(checkpoint_folders(self._checkpoints)):
                with contextlib.suppress(CheckpointError):
                    names.append((read_info(folder)["is_healthy"], folder.name))
        for is_healthy, name in names:
            if is_healthy:
                return f"from {name}"
        return f"from {names[0][1]}" if names else "from the beginning"

    def pause_s(self) -> float | None:
        """Another failure: seconds until the next start; None when there shall be none."""
        newest = self._newest_publication()
        if newest > self._newest:
            self._newest, self._failures = newest, 0
        self._failures += 1
        if self._failures > self._launch.max_restarts:
            return None
        return min(self._launch.restart_backoff_s * 2 ** (self._failures - 1), _LONGEST_BACKOFF_S)

    def wait(self, what: str, look: Callable[[], None] = lambda: None) -> bool:
        """Say that `what` happened, and wait.

        Args:
            what: a clause, "rank 1 was killed by SIGKILL".
            look: called once a second; what it raises ends the waiting.

        Returns:
            Whether to start again.
        """
        pause_s, tries = self.pause_s(), self._launch.max_restarts
        if pause_s is None:
            end = f"; {tries} restarts in a row brought no newer checkpoint (launch.max_restarts)" if tries else ""
            logger.error("%s%s; start again to resume from the newest checkpoint", what, end)
            return False
        message = "%s; starting again %s in %.0f s (%d of %d)"
        logger.warning(message, what, self._place(), pause_s, self._failures, tries)
        until_s = time.monotonic() + pause_s
        while (left_s := until_s - time.monotonic()) > 0:
            look()
            time.sleep(min(left_s, 1.0))
        return True


class Agent(LocalElasticAgent):
    """torchrun's agent of this machine.

    Args:
        spec: what to start, and where the nodes meet; its `max_restarts` is never reached.
        logs_specs: where error files go.
        patience: decides about a failure that a restart may help.
        grace_s: seconds from a signal to stop until processes are killed.
        is_elastic: the run may go on with fewer nodes: one that is asked to stop leaves the others at work.
    """

    def __init__(
        self, spec: WorkerSpec, logs_specs: LogsSpecs, *, patience: Patience, grace_s: float, is_elastic: bool
    ) -> None:
        super().__init__(spec, logs_specs)
        self._patience, self._grace_s, self._is_elastic = patience, grace_s, is_elastic
        self.last_status = 1
        """Exit status of the process that failed first, the last time that one did; negative for a signal."""

    def exit_statuses(self) -> dict[int, int]:
        """Local rank -> exit status of the processes that have ended; negative for a signal."""
        processes: Mapping[int, Any] = getattr(self._pcontext, "subprocess_handlers", {})
        statuses = {rank: handler.proc.poll() for rank, handler in processes.items()}
        return {rank: status for rank, status in statuses.items() if status is not None}

    def unsaved(self) -> dict[int, int]:
        """Of these the ones that did not end as processes do that are told to stop."""
        return {rank: status for rank, status in self.exit_statuses().items() if status not in _AS_ASKED}

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        # torch goes on with the store of the first round, which names the addresses of processes that are gone: gloo's
        # groups then connect to nobody. Without these two it makes a new one.
        handler: Any = worker_group.spec.rdzv_handler
        handler._bootstrap_store_info = handler._shared_tcp_store_server = None
        super()._rendezvous(worker_group)

    def tell_others(self, status: int) -> None:
        """Leave the run's exit status for the launchers of the other nodes, which end as well."""
        self._tell(_STATUS_KEY, str(status))

    def hear_status(self) -> int:
        """The exit status that another node's launcher left, else this one's last."""
        with contextlib.suppress(DistError):
            if self._store is not None and self._store.check([_STATUS_KEY]):
                return int(self._store.get(_STATUS_KEY))
        return self.last_status

    def _tell(self, key: str, value: str) -> None:
        with contextlib.suppress(DistError):  # the store went with the node that held it
            if self._store is not None:
                self._store.set(key, value)

    def _was_another_asked_to_stop(self) -> bool:
        """Whether the launcher of another node got a signal; also where it took the store with it."""
        try:
            return self._store is not None and bool(self._store.check([_ASKED_KEY]))
        except DistError:
            return True

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # Before the agent ends the others, whose statuses then say nothing.
        failed = self._first_failures()
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.HEALTHY and worker_group.spec.rdzv_handler.is_closed() and self.hear_status():
            # Another node has ended the run, and its processes are gone: these would wait for them.
            raise RendezvousClosedError
        has_failed = result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY)
        if has_failed and not self._shall_restart(worker_group, failed, self.exit_statuses()):
            self._remaining_restarts = 0
        return result

    def _first_failures(self) -> dict[int, int]:
        """Local rank -> exit status of those that failed; after a crash the others have time to say a mistake."""
        deadline_s = time.monotonic() + RANK_ERROR_DELAY_S / 2
        while True:
            statuses = self.exit_statuses()
            failed = {rank: status for rank, status in statuses.items() if status}
            is_explained = any(status < 0 or status in (*FINAL, ExitStatus.HUNG) for status in failed.values())
            is_running = self._pcontext is not None and len(statuses) < len(self._pcontext.pids())
            if not failed or is_explained or not is_running or time.monotonic() > deadline_s:
                return failed
            time.sleep(0.1)

    def _shall_restart(self, worker_group: WorkerGroup, first: Mapping[int, int], every: Mapping[int, int]) -> bool:
        """Decide, and wait where there is to be a pause.

        Args:
            worker_group: of this machine.
            first: local rank -> exit status of the processes that failed before the agent ended the others.
            every: the same of all.
        """
        # All of them may have ended between two looks: of those the agent has by now ended the rest.
        first = first or {rank: status for rank, status in every.items() if status not in _ENDED}
        # A signal that killed a process explains the rest. A mistake, which its rank says while its peers already
        # fail for want of it, explains everything but that.
        killed = {rank: status for rank, status in first.items() if status < 0}
        mistaken = {rank: status for rank, status in every.items() if status in FINAL[:2]}
        others = dict(sorted(first.items(), key=lambda item: item[1] in FINAL))
        rank, self.last_status = next(iter((killed or mistaken or others or {0: 1}).items()))
        if self.last_status in STOPPED and self._is_elastic and self._was_another_asked_to_stop():
            logger.warning("another node was asked to stop, and the run has saved; going on with those that are left")
            return True
        if self.last_status in FINAL:
            return False

        def end_with_others() -> None:
            if worker_group.spec.rdzv_handler.is_closed():
                raise RendezvousClosedError

        what = f"rank {worker_group.workers[rank].global_rank} {in_words(self.last_status)}"
        return self._patience.wait(what, end_with_others)

    def _shutdown(self, death_sig: signal.Signals | None = None, *_: Any, **__: Any) -> None:
        """Ask the processes to stop, and kill what is left when the time to save is over.

        The parameters that follow differ between releases of torch; the time is ours.

        Args:
            death_sig: that this launcher got; None where the agent ends processes of itself.

        Raises:
            SignalException: one came while the agent ended processes in order to start them again.
        """
        if self._pcontext is None:
            return
        # A closed terminal (SIGHUP) is a reason to save as well, and the processes know these two.
        asked = signal.SIGINT if death_sig == signal.SIGINT else signal.SIGTERM
        if death_sig is not None and self._is_elastic:
            self._tell(_ASKED_KEY, "yes")
        with self._repeats_tolerated() as came:
            self._pcontext.close(asked, timeout=max(1, round(self._grace_s)))
        if came and death_sig is None and self._remaining_restarts:
            raise SignalException(f"signal {came[0]} came between two starts", signal.Signals(came[0]))

    @contextlib.contextmanager
    def _repeats_tolerated(self) -> Iterator[list[int]]:
        """More signals do not cut the time to save short, but Ctrl-C again after a second does; yields what came."""
        since_s = time.monotonic()
        came: list[int] = []

        def again(signum: int, _frame: FrameType | None) -> None:
            came.append(signum)
            if signum == signal.SIGINT and time.monotonic() > since_s + SECOND_CTRL_C_S and self._pcontext:
                for pid in self._pcontext.pids().values():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)

        caught = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        previous = {signum: signal.signal(signum, again) for signum in caught}
        try:
            yield came
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def in_words(status: int) -> str:
    """What became of a process with this exit status, as the end of a sentence."""
    if status == ExitStatus.HUNG:
        return f"was ended by the trainer (a hang, exit status {status})"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"failed (exit status {status})"
