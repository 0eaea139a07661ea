"""What is done to a run: signals, a rank that hangs, damage, planted code, a full disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from megatron_hgpt.exit_status import ExitStatus
from tests.drills.processes import TimeIsUpError, wait_for
from tests.drills.sequence import END_S, START_S, Drill, Try, last_line

NOT_SAID, TRACEBACK = "not said", "traceback"
ENDED_BY_LIMIT = r"exit status 75|\bSIGKILL\b|signal 9\b"


class KillAll(Drill):
    """SIGKILL of launcher and ranks, as of a machine without memory; their helpers have to go by themselves."""

    name = "SIGKILL all"
    tries = 25

    def strike(self, attempt: Try) -> None:
        self.run.signal(signal.SIGKILL, [launcher.pid for launcher in self.run.launchers])
        self.run.signal(signal.SIGKILL, list(self.run.ranks().values()))


class KillInSave(KillAll):
    """The same while a checkpoint is being written."""

    name = "SIGKILL all in a save"

    def wait(self) -> None:
        self.wait_for_steps(self.rng.randint(1, 25))
        folder = self.run.checkpoints

        def is_saving() -> bool:
            names = os.listdir(folder) if folder.is_dir() else []
            return self.run.is_over() or any(name.endswith(".tmp") for name in names)

        wait_for(is_saving, START_S, "save", pause_s=0.001)
        time.sleep(self.rng.uniform(0, 0.05))


class KillRank(Drill):
    """SIGKILL of one rank; the launcher starts the run again."""

    name = "SIGKILL one rank"
    tries = 25

    def strike(self, attempt: Try) -> None:
        wait_for(lambda: self.run.ranks() or self.run.is_over(), START_S, "rank")
        if ranks := self.run.ranks():
            self.run.signal(signal.SIGKILL, [self.rng.choice(sorted(ranks.values()))])

    def check(self, attempt: Try, newest: int) -> None:
        super().check(attempt, newest)
        attempt.require(attempt.is_unattended, "not started again by the launcher")


class KillLauncher(Drill):
    """SIGKILL of the launcher alone; the ranks end with it."""

    name = "SIGKILL launcher"
    tries = 25

    def strike(self, attempt: Try) -> None:
        self.run.signal(signal.SIGKILL, [launcher.pid for launcher in self.run.launchers])
        wait_for(self.run.is_over, END_S, "end of a killed launcher")


class Terminate(Drill):
    """SIGTERM to the launcher; under Slurm to every process of the job's steps at once, as `--signal` does it."""

    name = "SIGTERM to hgpt train"
    tries = 8

    def strike(self, attempt: Try) -> None:
        began = time.monotonic()
        if self.way == "slurm":
            pids = [process.pid for process in self.run.processes() if process.pid != self.run.launchers[0].pid]
        else:
            pids = [self.run.launchers[0].pid]
        self.run.signal(signal.SIGTERM, pids)
        wait_for(self.run.is_over, END_S, "end after SIGTERM")
        attempt.ended_s = time.monotonic() - began

    def check(self, attempt: Try, newest: int) -> None:
        super().check(attempt, newest)
        attempt.require(not attempt.steps_lost, f"not saved: {attempt.steps_lost} steps lost")
        # torchrun's own is 1 whatever its processes say; before it listens to signals, one kills it as any program.
        expected = {143} if self.way != "torchrun" else {1, 143} if attempt.in_start else {1}
        attempt.require(attempt.status in expected, f"ended with status {attempt.status}, not {expected}")


class TerminateTorchrun(Terminate):
    """A torchrun of the user's own."""

    name = "SIGTERM to torchrun"
    way = "torchrun"


class TerminateSlurm(Terminate):
    """examples/slurm/pretrain_hgpt.sbatch with stand-ins for srun and scontrol: two nodes of a process each."""

    name = "SIGTERM from Slurm"
    way = "slurm"

    def check(self, attempt: Try, newest: int) -> None:
        super().check(attempt, newest)
        attempt.require(self.run.requeues() == 0, "queued itself again, though Slurm does that to what it preempts")


class Hang(Drill):
    """SIGSTOP of one rank: the console names it, the limit ends every rank, and the launcher starts the run again."""

    name = "SIGSTOP one rank"
    tries = 5
    warning_s, limit_s = 2.0, 5.0
    overrides = (f"timeouts.step_warning_s={warning_s}", f"timeouts.step_limit_s={limit_s}")

    def wait(self) -> None:
        self.wait_for_steps(self.rng.randint(4, 25))
        time.sleep(self.rng.uniform(0, self.reference.step_s))

    def strike(self, attempt: Try) -> None:
        ranks = self.run.ranks()
        rank = self.rng.choice(sorted(ranks))
        began = time.monotonic()
        self.run.signal(signal.SIGSTOP, [ranks[rank]])
        while time.monotonic() - began < 4 * self.limit_s + 10:
            if attempt.named_s is None and re.search(rf"\brank {rank}\b", self.run.text()):
                attempt.named_s = time.monotonic() - began
            if not set(ranks.values()) & {process.pid for process in self.run.processes()}:
                attempt.ended_s = time.monotonic() - began
                break
            time.sleep(0.1)
        attempt.notes.append(f"rank {rank} stopped")

    def check(self, attempt: Try, newest: int) -> None:
        super().check(attempt, newest)
        attempt.require(attempt.named_s is not None, "its rank was not named")
        attempt.require(attempt.ended_s is not None, "not ended by the limit")
        attempt.require(attempt.is_unattended, "not started again by the launcher")
        how = re.search(ENDED_BY_LIMIT, self.run.text())
        attempt.require(how is not None, "no exit status 75 and no kill in the log")


class Damage(KillAll):
    """One bit of one file of the newest checkpoint flips while the run is down: the one before is used, and said."""

    name = "flipped bit"
    tries = 10
    spoiled = 0

    def wait(self) -> None:
        wait_for(lambda: self.run.is_over() or len(self.run.saved_steps()) > 1, START_S, "second checkpoint")
        self.wait_for_steps(self.rng.randint(11, 20))

    def strike(self, attempt: Try) -> None:
        super().strike(attempt)
        self.run.remaining(END_S)
        if len(self.run.saved_steps()) > 1:
            self.spoiled = self.run.saved_steps()[-1]
            attempt.notes.append(self.spoil(self.run.newest()))

    def spoil(self, folder: Path) -> str:
        path = self.rng.choice(sorted(file for file in folder.iterdir() if file.stat().st_size))
        content = bytearray(path.read_bytes())
        position = self.rng.randrange(len(content))
        content[position] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)
        return f"{path.name}: byte {position} of {len(content)}"

    def check(self, attempt: Try, newest: int) -> None:
        begun = self.run.begun_at() or 0
        attempt.survived = begun < self.spoiled or self.spoiled == 0
        if not attempt.survived:
            attempt.notes.append("trained on")
        elif f"step_{self.spoiled:08d}" not in self.run.text().split("resumed from")[0]:
            attempt.survived = False
            attempt.notes.append("fell back silently")


class Planted:
    """Pickles to a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class Pickle(Damage):
    """An object that runs a command in the newest checkpoint's .metadata, sums and seal made to fit: it is not run."""

    name = "planted pickle"
    tries = 5

    def spoil(self, folder: Path) -> str:
        self.flag = self.run.folder / "executed"
        (folder / ".metadata").write_bytes(pickle.dumps(Planted(f"touch {self.flag}")))
        reseal(folder)
        return ".metadata"

    def check(self, attempt: Try, newest: int) -> None:
        super().check(attempt, newest)
        if self.spoiled and self.flag.exists():
            attempt.survived = False
            attempt.notes.append("EXECUTED")

    def start_again(self, attempt: Try) -> None:
        """A start that refuses the folder is as good as one that leaves it out: the operator removes it."""
        try:
            super().start_again(attempt)
        except TimeIsUpError:
            attempt.notes.append(f"refused: {last_line(self.run.text())}")
            if self.flag.exists():
                attempt.notes.append("EXECUTED")
                raise
            subprocess.run(["rm", "-r", str(self.run.checkpoints / f"step_{self.spoiled:08d}")], check=True)
            super().start_again(attempt)


def reseal(folder: Path) -> None:
    """What somebody who may write the folder can do: the description fits the files again."""
    path = folder / "healthgpt.json"
    info = json.loads(path.read_text())
    if "digest" not in info:
        return
    content = (folder / ".metadata").read_bytes()
    info["files"][".metadata"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del info["digest"]
    text = json.dumps(info, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**info, "digest": hashlib.sha256(text.encode()).hexdigest()}, indent=1))


class DiskFull(Drill):
    """The file system of the checkpoints fills up: a line says so, what is there stays, and a start goes on from it."""

    name = "full disk"
    tries = 5
    size = "16m"
    said = re.compile("intact")

    @property
    def disk(self) -> Path:
        return self.run.checkpoints

    def prepare(self) -> None:
        self.disk.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.disk)], check=True)

    def clean(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.disk)], check=False)

    def wait(self) -> None:
        self.wait_for_steps(self.rng.randint(11, 25))

    def strike(self, attempt: Try) -> None:
        ballast = self.disk / "ballast"
        with open(ballast, "wb", buffering=0) as file:

            def is_over() -> bool:
                """The room that a failed save gives back is taken too."""
                with contextlib.suppress(OSError):
                    while file.write(bytes(65536)) == 65536:
                        pass
                return self.run.is_over()

            wait_for(is_over, END_S, "end on a full disk")
        ballast.unlink()
        text = self.run.text()
        said = [line for line in text.splitlines() if str(self.disk) in line and self.said.search(line)]
        attempt.notes.append(said[-1][:200] if said else f"{NOT_SAID}: {last_line(text)}")
        if "Traceback" in text:
            attempt.notes.append(TRACEBACK)

    def check(self, attempt: Try, newest: int) -> None:
        super().check(attempt, newest)
        attempt.survived &= TRACEBACK not in attempt.notes
        attempt.survived &= not any(note.startswith(NOT_SAID) for note in attempt.notes)
        attempt.require(attempt.status == ExitStatus.USER_ERROR, f"ended with status {attempt.status}, not 2")


class OutputFull(DiskFull):
    """The file system of the whole output folder: figures, configuration and stacks have no room either."""

    name = "full output_dir"
    size = "24m"
    said = re.compile("intact|No space left")

    @property
    def disk(self) -> Path:
        return self.run.output


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a tmpfs."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    return mount.returncode == 0 and subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0


KINDS: dict[str, type[Drill]] = {
    kind.name: kind
    for kind in (
        KillAll, KillRank, KillLauncher, KillInSave, Terminate, TerminateTorchrun, TerminateSlurm, Hang, Damage, Pickle,
        DiskFull, OutputFull,
    )
}  # fmt: skip
