"""Runs of `hgpt train` in processes of their own, for tests that signal and kill them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


class LaunchedRun:
    """A command that trains into ``<folder>/run``, and every process that names that folder.

    Args:
        folder: takes the log, and the run's output_dir.
        command: without the output_dir.
        environment: beside this process's.
        name: of the log.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        name: str = "log",
    ) -> None:
        self.output, self.log = folder / "run", folder / name
        words = [str(word) for word in command] + [f"output_dir={self.output}"]
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NNODES")}
        paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                words, env={**inherited, **paths, **(environment or {})}, stdout=log, stderr=log, start_new_session=True
            )

    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(encoding="utf-8")

    def wait_for(self, pattern: str, count: int = 1, timeout_s: float = 280.0) -> None:
        """Until the log has the pattern, `count` times.

        Raises:
            AssertionError: it ended before, or did not come; the end of the log is the message.
        """
        deadline = time.monotonic() + timeout_s
        while len(re.findall(pattern, self.text(), re.M)) < count:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"no {pattern!r} (exit status {self.process.poll()}):\n{self.text()[-4000:]}")
            time.sleep(0.05)

    def wait(self, timeout_s: float = 280.0) -> int:
        """Its exit status."""
        return self.process.wait(timeout=timeout_s)

    def ranks(self) -> list[int]:
        """Pids of the processes that `hgpt train`, torchrun or ft_launcher started, by rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_ours = str(self.output).encode() in (process / "cmdline").read_bytes()
                rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", (process / "environ").read_bytes())
                if is_ours and rank:
                    found[int(rank[1])] = int(process.name)
        return [pid for _, pid in sorted(found.items())]

    def steps(self) -> list[str]:
        """Names of the finished checkpoints, and of what is left of unfinished ones."""
        folder = self.output / "checkpoints"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def end(self) -> None:
        """Kill what is left of it."""
        for pid in (self.process.pid, *self.ranks()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
