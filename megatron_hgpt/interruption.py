"""How a process of a run is stopped: signals that ask it to save and end, and a launcher that is no longer there."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

import torch

from megatron_hgpt.distributed import DistributedContext
from megatron_hgpt.environment import launcher_from_environment, started_by_an_elastic_launcher

SECOND_CTRL_C_S = 1.0
"""Seconds after the first signal from which on Ctrl-C means: at once. Launchers and clusters repeat theirs earlier."""
_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends when the parent ends."""


class StopSignals:
    """SIGTERM (torchrun, Slurm) and SIGINT (Ctrl-C) ask the run to finish its step, save and end.

    The same signal comes more than once: from Slurm to every process, and again from the launcher that forwards it.
    Repeats change nothing, except Ctrl-C again after a second, which ends the process at once.
    """

    def __init__(self) -> None:
        self.number = 0
        """Of the signal that stops the run, agreed by all ranks; 0 as long as they have not."""
        self._asked = 0
        self._since_s = 0.0
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals, in the main thread; elsewhere the embedding program keeps its own handlers."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[signum] = signal.signal(signum, self._ask)
            except ValueError:
                break

    def leave(self) -> None:
        """Put the former handlers back. After a stop a SIGTERM that is repeated ends the process with its status."""
        for signum, handler in self._previous.items():
            stopped = self.number != 0 and signum == signal.SIGTERM
            signal.signal(signum, (lambda *_: sys.exit(128 + self.number)) if stopped else handler)
        self._previous = {}

    def agree(self, context: DistributedContext) -> bool:
        """Whether any rank was asked to stop, alike on every rank: a checkpoint needs all of them."""
        # A signal may come between any two lines: what is asked is never overwritten, and counts the next time.
        self.number = self._asked
        if context.world_size > 1:
            number = torch.tensor([self.number], device=context.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.number = int(number.item())
        return self.number != 0

    def _ask(self, signum: int, _frame: FrameType | None) -> None:
        if self._since_s and signum == signal.SIGINT and time.monotonic() > self._since_s + SECOND_CTRL_C_S:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self._since_s = self._since_s or time.monotonic()
        self._asked = self._asked or signum


def die_with_launcher() -> None:
    """End with the torchrun that started this process, however it ends: nobody would stop or restart this one.

    Does nothing without such a launcher and where there is no prctl(2).
    """
    if not (started_by_an_elastic_launcher() and sys.platform == "linux"):
        return
    launcher = launcher_from_environment() or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)
