"""One run as an operator has it: its processes, its log and its checkpoints; started by a real launcher."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_hgpt.testing.distributed import free_port

ROOT = Path(__file__).parents[2]
MARK, NODE = "HGPT_DRILL", "HGPT_DRILL_NODE"
# What a test run under a launcher would hand on.
STEP = re.compile(r"step (\d+)/\d+: loss")
RESUMED, RESUMED_AT = re.compile(r"resumed from \S+: \d+ of"), re.compile(r"resumed from \S+: (\d+) of")
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(kw_only=True, frozen=True)
class Layout:
    """Two processes, and what each is for."""

    name: str
    overrides: tuple[str, ...]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(name="tp2", overrides=("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")),
        Layout(name="pp2", overrides=("parallel.pipeline_model_parallel_size=2",)),
        Layout(name="dp2", overrides=("parallel.use_distributed_optimizer=true",)),
        Layout(name="cp2", overrides=("parallel.context_parallel_size=2",)),
        Layout(name="deepspeed", overrides=("engine.name=deepspeed",)),
    )
}


@dataclasses.dataclass(kw_only=True, frozen=True)
class Process:
    """One entry of /proc."""

    pid: int
    parent: int
    environment: dict[str, str]

    @property
    def rank(self) -> int | None:
        """Of the trainer's process; its helpers have their parent's."""
        return int(self.environment["RANK"]) if "RANK" in self.environment else None


def marked_processes(mark: str) -> list[Process]:
    """Living processes, zombies left out, that were started with the mark, whatever became of their parents."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            raw = (entry / "environ").read_bytes().decode(errors="replace")
            if f"{MARK}={mark}" not in raw:
                continue
            state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if state not in "ZX":
            variables = dict(part.split("=", 1) for part in raw.split("\0") if "=" in part)
            found.append(Process(pid=int(entry.name), parent=int(parent), environment=variables))
    return sorted(found, key=lambda process: process.pid)


class TimeIsUpError(AssertionError):
    """What was waited for did not come."""


def wait_for(condition: Callable[[], object], seconds: float, what: str, pause_s: float = 0.02) -> float:
    """Seconds until `condition` was true.

    Raises:
        TimeIsUpError: it was not, in that time.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise TimeIsUpError(f"no {what} within {seconds:g} s")
        time.sleep(pause_s)
    return time.monotonic() - started


class Run:
    """A run in a folder, started as often as it takes.

    Args:
        folder: made; gets ``run`` (the output folder), ``logs`` and ``tmp`` (TMPDIR of the processes).
        config: run.yaml of `assets.write_assets`.
        overrides: of the configuration.
        way: hgpt, torchrun or slurm: what starts the processes.
    """

    def __init__(self, folder: Path, config: Path, overrides: Sequence[str], way: str = "hgpt") -> None:
        self.folder, self.way = folder, way
        self.output, self.checkpoints = folder / "run", folder / "run" / "checkpoints"
        self.arguments = ["--config", str(config), f"output_dir={self.output}", *overrides]
        self.mark = uuid.uuid4().hex
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.log = folder / "none"
        self._log_start = 0
        for name in ("logs", "tmp"):
            (folder / name).mkdir(parents=True)

    def environment(self) -> dict[str, str]:
        own = {key: value for key, value in os.environ.items() if key not in FOREIGN}
        return {
            **own, MARK: self.mark, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.folder / "tmp"), "NPROC_PER_NODE": "2",
        }  # fmt: skip

    def start(self) -> None:
        """Start it, or start it again, with a log of its own."""
        self.next_log()
        self.launchers = [self.launch([*self.command(), *self.arguments], self.environment_of_way())]

    def next_log(self) -> None:
        """Each start has its own."""
        self.log = self.folder / "logs" / f"{len(list((self.folder / 'logs').iterdir())):03d}.log"
        self._log_start = 0

    def launch(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def command(self) -> list[str]:
        script = str(ROOT / "examples" / "pretrain_hgpt.sh")
        return {
            "hgpt": [sys.executable, "-m", "megatron_hgpt", "train"],
            "torchrun": [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script,
            ],
            "slurm": ["bash", str(ROOT / "examples" / "slurm" / "pretrain_hgpt.sbatch")],
        }[self.way]  # fmt: skip

    def environment_of_way(self) -> dict[str, str]:
        if self.way != "slurm":
            return self.environment()
        commands = write_slurm(self.folder / "slurm")
        return {
            **self.environment(), "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "1",
            "SLURM_RESTART_COUNT": str(self.requeues()),
            "NPROC_PER_NODE": "1", "MASTER_PORT": str(free_port()),
        }  # fmt: skip

    def requeues(self) -> int:
        """How often the job queued itself again; the next start is told so, as Slurm tells it."""
        requeued = self.folder / "slurm" / "requeued"
        return len(requeued.read_text().splitlines()) if requeued.exists() else 0

    # What is there

    def processes(self) -> list[Process]:
        return marked_processes(self.mark)

    def ranks(self) -> dict[int, int]:
        """Rank -> pid of the trainers' processes themselves: their helpers have a rank as parent."""
        found = self.processes()
        trainers = {process.pid for process in found if process.rank is not None}
        return {
            process.rank: process.pid
            for process in found
            if process.rank is not None and process.parent not in trainers
        }

    def is_over(self) -> bool:
        return all(launcher.poll() is not None for launcher in self.launchers)

    def status(self) -> int:
        """The first launcher's exit status, once it has ended; 128 + signal where one killed it."""
        status = self.launchers[0].wait()
        return 128 - status if status < 0 else status

    def text(self) -> str:
        """What the log says since the start, or since the last `forget`."""
        if not self.log.exists():
            return ""
        with open(self.log, "rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def forget(self) -> None:
        """`text` begins here."""
        self._log_start = self.log.stat().st_size

    def step(self) -> int | None:
        """The last one that the log says is done since training began (again); None where there is none yet."""
        steps = STEP.findall(RESUMED.split(self.text())[-1])
        return int(steps[-1]) if steps else None

    def begun_at(self) -> int | None:
        """Steps that were done when training began (again); None where it has not."""
        text = self.text()
        if resumed := RESUMED_AT.findall(text):
            return int(resumed[-1])
        return 0 if "1" in STEP.findall(text) else None

    def saved_steps(self) -> list[int]:
        """Of complete checkpoints, in order."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(
            int(path.name[5:]) for path in self.checkpoints.iterdir() if re.fullmatch(r"step_\d{8}", path.name)
        )

    def newest(self) -> Path:
        return self.checkpoints / f"step_{self.saved_steps()[-1]:08d}"

    def leftovers(self) -> list[str]:
        """What a finished run should not have left in its folder."""
        known = re.compile(r"checkpoints/step_\d{8}(/.*)?|checkpoints|watchdog(/rank_\d+\.txt)?|[\w.-]+\.(jsonl?|yaml)")
        names = [str(path.relative_to(self.output)) for path in self.output.rglob("*")]
        return sorted(name for name in names if not known.fullmatch(name) or ".tmp" in name)

    # What is done to it

    def signal(self, signum: int, pids: Sequence[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def remaining(self, seconds: float) -> list[Process]:
        """Processes that are still there after so long."""
        with contextlib.suppress(TimeIsUpError):
            wait_for(lambda: not self.processes(), seconds, "end", pause_s=0.1)
        return self.processes()

    def end(self) -> None:
        """Kill what is left."""
        while left := self.processes():
            self.signal(signal.SIGKILL, [process.pid for process in left])
            for launcher in self.launchers:
                launcher.poll()
            time.sleep(0.05)
        for launcher in self.launchers:
            launcher.wait()


def write_slurm(folder: Path) -> Path:
    """Stand-ins for srun (one task per node, all on this machine) and scontrol; script and processes are real."""
    folder.mkdir(exist_ok=True)
    srun = (
        '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\n'
        'SLURM_NODEID=0 SLURM_PROCID=0 "$@" & first=$!\nSLURM_NODEID=1 SLURM_PROCID=1 "$@" & second=$!\n'
        "trap : TERM\n"
        "join() { wait $1; s=$?; while kill -0 $1 2>/dev/null; do wait $1; s=$?; done; return $s; }\n"
        "join $first; a=$?; join $second; b=$?; exit $((a > b ? a : b))\n"
    )
    requeue = f'[ "$1" = requeue ] && echo "$*" >>{folder}/requeued\n'
    scontrol = f'#!/bin/sh\n{requeue}[ "$1" = show ] && printf "127.0.0.2\\nx\\n"\n'
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder
