"""One owner per folder that a run writes: a second run of the same folder is refused, a dead owner's is taken over."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megatron_hgpt.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
BEAT_S = 5.0
"""Seconds between the owner's touches of its file, which machines see that do not share flock(2)."""
DEAD_AFTER_S = 30.0
"""Seconds without one after which an owner on another machine counts as dead."""
LEASE_S = 120.0
"""Seconds for a file server to give up the lock of a machine that is lost; NFS has 90."""
PATIENCE_S = 15.0
"""Seconds that a live owner is waited for: a run that was just told to stop is still ending."""


class FolderOwner:
    """Owns a folder from `with` to its end, by flock(2) on ``run.lock`` and by touching that file.

    flock says at once, on this machine and on network file systems that support it, whether the owner lives. Where it
    says nothing (another machine, a file system without it), an owner is alive as long as the file's time moves.

    Args:
        folder: made if it is not there.

    Raises:
        ConfigError: on entering; a live process owns it.
        OSError: on entering; it cannot be written, and nothing is left in it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._file: IO[str] | None = None
        self._is_refused = False
        """By flock, the last time."""
        self._end = threading.Event()

    def __enter__(self) -> FolderOwner:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        since_s = moved_s = time.monotonic()
        before: float | None = None
        while (owner := self._try()) is not None:
            beat, now_s = self._beat(), time.monotonic()
            if before not in (None, beat):
                moved_s = now_s
            before = beat
            is_alive = self._is_refused and owner.get("machine") == _machine()
            if not self._is_refused and now_s > moved_s + DEAD_AFTER_S:
                self._say_taken_over(owner)
                self.path.unlink(missing_ok=True)  # the next try is on a new file, whose lock nobody has
            elif now_s > since_s + (PATIENCE_S if is_alive or moved_s > since_s else LEASE_S):
                raise ConfigError(
                    f"{self.path.parent} belongs to a run that is alive: {_in_words(owner)}. "
                    "Stop that one, or give this run another output_dir"
                )
            time.sleep(0.2)
        threading.Thread(target=self._touch, name="owner of the run's folder", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._file is not None:
            if self._is_ours():
                self.path.unlink(missing_ok=True)
            self._file.close()

    def _try(self) -> dict[str, Any] | None:
        """Take the folder; what is known of its owner where there is one that may live, else None."""
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115  (open as long as the folder is owned)
        is_locked = _lock(file)
        self._file = file
        if not self._is_ours():  # removed or replaced meanwhile
            file.close()
            return self._try()
        file.seek(0)
        owner, self._is_refused = _parse(file.read()), is_locked is False
        is_free = owner is None or (is_locked and owner.get("machine") == _machine())
        if self._is_refused or not is_free:
            file.close()
            self._file = None
            return owner or {}
        if owner is not None:
            self._say_taken_over(owner)
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        description = {"host": socket.gethostname(), "pid": os.getpid(), "started": started, "machine": _machine()}
        try:
            file.truncate(0)
            file.write(json.dumps(description))
            file.flush()
        except OSError:  # an empty file would be taken for a run that has just begun to write it
            self.path.unlink(missing_ok=True)
            self._file = None
            with contextlib.suppress(OSError):  # closing tries to write once more
                file.close()
            raise
        return None

    def _say_taken_over(self, owner: dict[str, Any]) -> None:
        logger.warning("%s was left by a run that has ended: %s; taken over", self.path, _in_words(owner))

    def _is_ours(self) -> bool:
        assert self._file is not None
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        return False

    def _beat(self) -> float:
        with contextlib.suppress(FileNotFoundError):
            return self.path.stat().st_mtime
        return 0.0

    def _touch(self) -> None:
        """Show that the owner lives; one that was taken for dead ends, for another writes where it would."""
        while not self._end.wait(BEAT_S):
            with contextlib.suppress(OSError):
                # A file that is merely gone, somebody removed: it is made anew.
                if not self._is_ours() and (self.path.exists() or self._try() is not None):
                    logger.error("%s was taken over by another run while this one stood still; ending", self.path)
                    os._exit(1)
                os.utime(self.path)


def _lock(file: IO[str]) -> bool | None:
    """Whether flock(2) gave the file to this process; None where the file system has no such thing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _machine() -> str:
    """What distinguishes machines whose names may be the same."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()


def _parse(text: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return None


def _in_words(owner: dict[str, Any]) -> str:
    return f"host {owner.get('host')}, pid {owner.get('pid')}, started {owner.get('started')}"
