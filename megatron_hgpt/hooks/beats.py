"""What every rank tells about itself every few seconds, and which rank is behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_hgpt.hooks.base import Phase

_PACKAGE = Path(__file__).parents[1]
_WAITING = ("torch/distributed/", "p2p_communication.py")
"""Parts of the paths of files in which a rank waits for others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """One rank's state; the numbers only ever grow."""

    number: int
    """Of the beat: a rank whose number stands still does not run at all."""
    progress: int
    """Phases begun. Ranks go through the same ones, so the rank with the fewest is behind."""
    step: int
    """The step that is under way."""
    phase: Phase
    place: str
    """File, line and function of this package."""
    is_waiting: bool
    """In a collective, for others. On a GPU ranks also wait where results are read, which does not show."""
    host: str
    pid: int
    started: str | None
    """When the process started: a number that another process with the same pid would not have."""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes | str) -> Beat:
        """The way back."""
        fields = json.loads(text)
        return cls(**{**fields, "phase": Phase(fields["phase"])})

    def describe(self, rank: int, *, is_silent: bool = False) -> str:
        """Which process, and where it stands, or stood when it was last heard of."""
        host = self.host.partition(" ")[0]
        return f"rank {rank} (pid {self.pid} on {host}), {'last seen ' * is_silent}{self.phase} at {self.place}"


def host_name() -> str:
    """This machine, and the process-id namespace (of a container) in which pids mean something."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def process_start(pid: int) -> str | None:
    """Field 22 of /proc/<pid>/stat; None where there is no such process or file."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def place_of(thread: int) -> tuple[str, bool]:
    """Where a thread of this process stands in this package, and whether it waits in a collective."""
    frame, is_waiting = sys._current_frames().get(thread), False
    while frame is not None:
        path = frame.f_code.co_filename
        if Path(path).is_relative_to(_PACKAGE):
            return f"{Path(path).relative_to(_PACKAGE.parent)}:{frame.f_lineno} in {frame.f_code.co_name}", is_waiting
        is_waiting = is_waiting or any(part in path for part in _WAITING)
        frame = frame.f_back
    return "an unknown place", is_waiting


def ranks_behind(beats: Mapping[int, Beat], silent: Collection[int]) -> list[int]:
    """The ranks that the others wait for: those that do not run; else those that came least far and do not wait.

    All ranks, where nothing tells them apart.
    """
    if silent:
        return sorted(silent)
    least = min((beat.progress, beat.is_waiting) for beat in beats.values())
    return [rank for rank, beat in sorted(beats.items()) if (beat.progress, beat.is_waiting) == least]


def kill_silent(beats: Mapping[int, Beat], silent: Collection[int], host: str) -> None:
    """SIGKILL to ranks of this machine that do not run: a stopped process obeys nothing else."""
    for beat in (beats[rank] for rank in silent):
        if beat.host == host and beat.started is not None and process_start(beat.pid) == beat.started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(beat.pid, signal.SIGKILL)
