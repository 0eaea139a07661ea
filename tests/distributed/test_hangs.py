"""A rank that hangs or diverges, under a real launcher: it is named on the console, and the run ends on every rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_hgpt.config import ParallelConfig
from megatron_hgpt.exit_status import ExitStatus
from megatron_hgpt.testing.distributed import run_ranks
from tests.drills.assets import write_assets

ROOT = Path(__file__).parents[2]
WARNING_S, LIMIT_S = 3.0, 6.0

FAULTY = """
import ctypes, os, signal, sys, time
from megatron_hgpt.cli import main
from megatron_hgpt.data.loader import TrainLoader

rank, fault = int(os.environ["RANK"]), os.environ["FAULT"]
next_step = TrainLoader.next_step

def hang(self):
    if self._step == 2 and rank == int(os.environ["FAULTY_RANK"]):
        if fault == "sleep":
            time.sleep(1000)
        elif fault == "lock":  # with Python's lock held, no other thread of the process runs
            ctypes.PyDLL(None).sleep(1000)
        elif fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault == "error":
            raise ValueError("a fault of one rank alone")
        elif fault == "diverge":
            batches = next_step(self)
            batches[0].pixel_values.fill_(float("nan"))
            return batches
        elif fault == "slow":
            time.sleep(10)
    return next_step(self)

if fault == "loader":
    from megatron_hgpt.data.loader import TrainLoader
    build = TrainLoader._build
    TrainLoader._build = lambda self, index: time.sleep(1000 if index >= 4 and rank == 1 else 0) or build(self, index)
else:
    TrainLoader.next_step = hang
if __name__ == "__main__":
    sys.exit(main())
"""


class Run:
    """torchrun with two ranks of `hgpt train`, one of them with a fault in its third step."""

    def __init__(self, folder: Path, config: Path, fault: str, rank: int, *overrides: str) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "faulty.py").write_text(FAULTY)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(folder / "faulty.py"), "train", "--config", str(config), f"output_dir={folder / 'run'}",
            "training.num_steps=4", f"timeouts.step_warning_s={WARNING_S}", f"timeouts.step_limit_s={LIMIT_S}",
            *overrides,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FAULT": fault}
        environment |= {"FAULTY_RANK": str(rank)}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stderr=log, stdout=log, start_new_session=True
            )

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, pattern: str, timeout_s: float) -> float:
        """Seconds since the epoch when the log has the pattern."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.text()):
            assert time.monotonic() < deadline and self.process.poll() is None, self.text()[-3000:]
            time.sleep(0.1)
        return time.monotonic()

    def wait(self, timeout_s: float) -> int:
        return self.process.wait(timeout=timeout_s)

    def ranks(self) -> list[int]:
        """Pids that still run."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.folder / "faulty.py").encode() in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def started() -> Iterator[list[Run]]:
    runs: list[Run] = []
    yield runs
    for run in runs:
        for pid in [run.process.pid, *run.ranks()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        run.process.wait()


NAMED = {
    (
        "sleep",
        1,
    ): r"no progress after step 2 for .* s: behind is rank 1 \(pid \d+ on .*\), loading data at .*; stacks in "
    r"\S+/watchdog/rank_1\.txt; look at the storage of data\.train",
    ("sleep", 0): r"behind is rank 0 \(pid \d+ on .*\), loading data at .*; stacks in \S+/watchdog/rank_0\.txt",
    ("stop", 1): r"no sign of life for .* s from rank 1 \(pid \d+ on .*\), last seen .*: stopped, or its machine",
    ("stop", 0): r"no sign of life for .* s from rank 0 \(pid \d+ on .*\), last seen .*: stopped, or its machine",
    ("lock", 1): r"no sign of life for .* s from rank 1 \(pid \d+ on .*\), last seen .*: stopped, or its machine",
}


@pytest.mark.parametrize(("fault", "rank"), NAMED, ids=lambda value: str(value))
def test_a_rank_that_hangs_is_named_and_the_run_ends(
    fault: str, rank: int, config: Path, tmp_path: Path, started: list[Run]
) -> None:
    run = Run(tmp_path, config, fault, rank)
    started.append(run)
    began = run.wait_for(r"step 2/4: ", 120)
    named = run.wait_for(NAMED[fault, rank], 4 * WARNING_S) - began
    assert run.wait(4 * LIMIT_S) != 0
    assert named < 2 * WARNING_S + 2 and time.monotonic() - began < 3 * LIMIT_S
    text = run.text()
    assert "In " in text and "ends on every rank with exit status 75 and can be started again (timeouts." in text
    assert re.search(r"HungError: .*start again to go on from the newest checkpoint", text)
    assert f"exitcode  : {ExitStatus.HUNG.value} " in text, text[-3000:]
    assert not run.ranks()
    stacks = (tmp_path / "run" / "watchdog" / f"rank_{rank}.txt").read_text()
    if fault != "stop":  # a stopped process writes nothing
        assert 'faulty.py", line ' in stacks and "in hang" in stacks
    assert "train_step" in (tmp_path / "run" / "watchdog" / f"rank_{1 - rank}.txt").read_text()


def test_a_slow_step_is_named_and_the_run_goes_on(config: Path, tmp_path: Path, started: list[Run]) -> None:
    run = Run(tmp_path, config, "slow", 1, "timeouts.step_limit_s=30", "training.num_steps=60")
    started.append(run)
    assert run.wait(120) == 0, run.text()[-3000:]
    assert "behind is rank 1" in run.text() and "the run goes on, at step" in run.text()
    assert (tmp_path / "run" / "watchdog" / "rank_1.txt").stat().st_size > 0


def test_samples_that_do_not_come(config: Path, tmp_path: Path, started: list[Run]) -> None:
    """The thread that waits for them would keep the process for ever."""
    run = Run(tmp_path, config, "loader", 1, "timeouts.loader_s=2", "timeouts.step_limit_s=100")
    started.append(run)
    began = run.wait_for(r"step 1/4: ", 120)
    assert run.wait(60) != 0
    assert time.monotonic() - began < 20
    said = r"HungError: the samples of step \d were not there after 2 s \(timeouts\.loader_s\) on data-parallel rank 1"
    assert re.search(said, run.text()), run.text()[-3000:]
    assert f"exitcode  : {ExitStatus.HUNG.value} " in run.text() and not run.ranks()


def test_a_run_that_diverges_says_so_and_is_not_worth_another_start(
    config: Path, tmp_path: Path, started: list[Run]
) -> None:
    run = Run(tmp_path, config, "diverge", 1, "anomaly.not_finite=stop", "timeouts.step_limit_s=60")
    started.append(run)
    assert run.wait(120) != 0
    said = r"DivergedError: step 3: the loss is not finite on rank 1, micro-batch 1 of \d \(sample.*not_finite=stop"
    assert re.search(said, run.text()), run.text()[-3000:]
    assert re.search(rf"exitcode  : {ExitStatus.DIVERGED.value} ", run.text())


def collective(timeout_s: float) -> list[float]:
    """Seconds that the first rank waits in a collective of each group that the second never joins."""
    from megatron.core import parallel_state

    from megatron_hgpt import distributed

    context = distributed.initialize(ParallelConfig(), 1, timeout_s)
    waited = []
    for group in (None, parallel_state.get_data_parallel_group()) if context.rank == 0 else ():
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            torch.distributed.all_reduce(torch.zeros(1), group=group)
        waited.append(time.monotonic() - began)
    if context.rank:
        time.sleep(4 * timeout_s)
    return waited


def test_collectives_of_every_group_have_the_configured_timeout() -> None:
    waited, _ = run_ranks(collective, 2, 1.5, timeout_s=90.0)
    assert len(waited) == 2 and all(1 < seconds < 5 for seconds in waited)
