"""Signals, kills and lost nodes under the real launchers: what is saved, what starts again, how it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_hgpt.exit_status import ExitStatus
from megatron_hgpt.ownership import FolderOwner
from megatron_hgpt.testing.distributed import free_port
from megatron_hgpt.testing.launching import ROOT, LaunchedRun
from tests.drills.assets import write_assets

TRAIN = [sys.executable, "-m", "megatron_hgpt", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SCRIPT = str(ROOT / "examples" / "pretrain_hgpt.sh")
LONG = ["training.num_steps=20000", "checkpoint.save_interval_steps=25", "launch.restart_backoff_s=0.5"]
Start = Callable[..., LaunchedRun]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def start(config: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a run of two ranks, and ends it with the test."""
    runs: list[LaunchedRun] = []

    def launch(*overrides: str, command: list[str] = TRAIN, name: str = "log", **environment: str) -> LaunchedRun:
        words = [*command, "--config", str(config), *LONG, *overrides]
        runs.append(LaunchedRun(tmp_path, words, {"NPROC_PER_NODE": "2", **environment}, name))
        return runs[-1]

    yield launch
    for run in runs:
        run.end()


def assert_saved(run: LaunchedRun) -> None:
    """The step that the run said it stopped after is there, and no half one."""
    (step,) = re.findall(r"stopped by a signal after step (\d+); start again to resume", run.text())
    assert run.steps()[-1] == f"step_{int(step):08d}", run.text()[-3000:]
    assert all(re.fullmatch(r"step_\d{8}", name) for name in run.steps())
    assert "Traceback" not in run.text()


LAUNCHERS = {
    "hgpt": (TRAIN, 143),
    # torchrun raises what it was sent, whatever its processes do: the status is its own, and so is its traceback.
    "torchrun": ([*TORCHRUN, SCRIPT], 1),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_repeated_sigterm_saves(launcher: str, start: Start) -> None:
    command, status = LAUNCHERS[launcher]
    run = start(command=command)
    run.wait_for("checkpoint saved")
    run.process.send_signal(signal.SIGTERM)
    if launcher == "hgpt":  # torchrun itself gives up waiting at the second one
        time.sleep(0.05)
        run.process.send_signal(signal.SIGTERM)
    for pid in run.ranks():  # and Slurm sends its own to every process
        os.kill(pid, signal.SIGTERM)
    assert run.wait() == status, run.text()[-3000:]
    if launcher == "hgpt":
        assert_saved(run)
        assert not (run.output / "run.lock").exists()
    else:
        step = re.findall(r"stopped by a signal after step (\d+)", run.text())[0]
        assert run.steps()[-1] == f"step_{int(step):08d}"
    assert run.ranks() == []


def test_a_signal_to_one_rank_stops_all(start: Start) -> None:
    """torchrun's processes end with 143 by themselves: the launcher hands it on, and does not restart."""
    run = start()
    run.wait_for("checkpoint saved")
    os.kill(run.ranks()[1], signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.text()[-3000:]
    assert_saved(run)


def test_ctrl_c_saves_and_a_second_one_ends_at_once(start: Start) -> None:
    run = start()
    run.wait_for("checkpoint saved")
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 128 + signal.SIGINT, run.text()[-3000:]
    assert_saved(run)
    run = start(name="second")
    run.wait_for("checkpoint saved")
    os.kill(run.ranks()[1], signal.SIGSTOP)  # nobody saves
    run.process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert run.process.poll() is None, "the first one waits"
    since_s = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.wait(20) == 1 and time.monotonic() - since_s < 10
    assert run.ranks() == [] and "local ranks did not save: 0" in run.text()


def test_what_does_not_save_in_time_is_killed_and_said(start: Start) -> None:
    run = start("launch.grace_s=2")
    run.wait_for("checkpoint saved")
    os.kill(run.ranks()[1], signal.SIGSTOP)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(30) == 1, "143 would promise a checkpoint"
    assert "stopped by signal 15, but local ranks did not save: 0 (exit status" in run.text()
    assert run.ranks() == []


def test_a_killed_rank_starts_again_from_the_newest_checkpoint(start: Start) -> None:
    run = start("training.num_steps=150")
    run.wait_for("checkpoint saved")
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.wait() == 0, run.text()[-3000:]
    (newest,) = re.findall(
        r"rank 1 was killed by SIGKILL; starting again from (step_\d+) in 0 s \(1 of 3\)", run.text()
    )
    assert f"resumed from {run.output / 'checkpoints' / newest}" in run.text()
    assert run.steps()[-1] == "step_00000150"
    records = [json.loads(line)["step"] for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert records == list(range(1, 151))


def test_a_new_run_that_starts_again_finds_its_own_checkpoints(start: Start) -> None:
    """checkpoint.resume=false is about what an earlier run left."""
    run = start("training.num_steps=150", "checkpoint.resume=false")
    run.wait_for("checkpoint saved")
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.wait() == 0, run.text()[-3000:]
    assert "rank 1 was killed by SIGKILL; starting again from step_" in run.text() and "resumed from" in run.text()
    again = start("training.num_steps=200", "checkpoint.resume=false", name="again")
    assert again.wait() == ExitStatus.USER_ERROR and "of an earlier run" in again.text()
    requeued = start("training.num_steps=151", "checkpoint.resume=false", name="requeued", SLURM_RESTART_COUNT="1")
    assert requeued.wait() == 0, requeued.text()[-3000:]


def test_one_process_starts_again_as_well(start: Start) -> None:
    run = start("training.num_steps=150", NPROC_PER_NODE="1")
    run.wait_for("checkpoint saved")
    os.kill(run.ranks()[0], signal.SIGKILL)
    assert run.wait() == 0, run.text()[-3000:]
    assert "rank 0 was killed by SIGKILL; starting again from step_" in run.text()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_die_with_their_launcher_and_the_next_run_takes_over(launcher: str, start: Start) -> None:
    run = start(command=LAUNCHERS[launcher][0])
    run.wait_for("checkpoint saved")
    ranks = run.ranks()
    run.process.kill()
    deadline = time.monotonic() + 5
    while run.ranks() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(ranks) == 2 and run.ranks() == []
    owner = json.loads((run.output / "run.lock").read_text())
    again = start("training.num_steps=1", name="again")
    assert again.wait() == 0, again.text()[-3000:]
    assert f"pid {owner['pid']}, started {owner['started']}; taken over" in again.text()
    assert not (run.output / "run.lock").exists()


def test_a_folder_has_one_owner(start: Start) -> None:
    run = start()
    run.wait_for("checkpoint saved")
    second = start(name="second")
    assert second.wait() == ExitStatus.USER_ERROR
    (line,) = [line for line in second.text().splitlines() if line.startswith("ConfigError: ")]
    assert "starting again" not in second.text() and "Traceback" not in second.text()
    assert f"{run.output} belongs to a run that is alive: host" in line and "another output_dir" in line
    assert run.process.poll() is None, "the first one is not disturbed"


def start_node(start: Start, rank: int, port: int, name: str, *overrides: str, nodes: str = "2") -> LaunchedRun:
    return start(
        "launch.restart_backoff_s=1", *overrides, name=name, NPROC_PER_NODE="1", NNODES=nodes, NODE_RANK=str(rank),
        MASTER_ADDR="127.0.0.2", MASTER_PORT=str(port),
    )  # fmt: skip


def wait_for_either(runs: list[LaunchedRun], pattern: str, timeout_s: float = 280.0) -> None:
    """Rank 0 is on either node."""
    deadline = time.monotonic() + timeout_s
    while not any(re.search(pattern, run.text()) for run in runs):
        assert time.monotonic() < deadline, "\n\n".join(run.text()[-2000:] for run in runs)
        time.sleep(0.05)


@pytest.mark.parametrize("lost", [1, 0], ids=["the second", "the first"])
def test_a_lost_node_is_replaced_without_a_hand_on_the_other(lost: int, start: Start) -> None:
    """The launcher of a node is killed with all that it started; a cluster starts one in its place."""
    port = free_port()
    steps = "training.num_steps=400"
    nodes = [start_node(start, rank, port, f"node{rank}", steps) for rank in range(2)]
    wait_for_either(nodes, "checkpoint saved")
    nodes[lost].process.kill()
    nodes[1 - lost].wait_for(r"starting again from step_\d+ in 1 s")
    nodes[lost] = start_node(start, lost, port, "replacement", steps)
    assert [node.wait() for node in nodes] == [0, 0], "\n\n".join(node.text()[-2000:] for node in nodes)
    assert nodes[0].steps()[-1] == "step_00000400"


@pytest.mark.slow
def test_a_run_goes_on_with_the_nodes_that_are_left_and_with_one_that_comes(start: Start) -> None:
    port = free_port()
    nodes = [start_node(start, rank, port, f"node{rank}", nodes="1:2") for rank in range(2)]
    wait_for_either(nodes, "checkpoint saved")
    nodes[1].process.kill()
    nodes[0].wait_for("data 1$", timeout_s=200)
    nodes[0].wait_for("checkpoint saved", nodes[0].text().count("checkpoint saved") + 1)
    nodes[1] = start_node(start, 1, port, "replacement", nodes="1:2")
    wait_for_either(nodes, r"data 1\n(.*\n)*.*data 2\n(.*\n)*.*checkpoint saved")
    nodes[0].process.send_signal(signal.SIGTERM)
    nodes[1].process.send_signal(signal.SIGTERM)
    assert [node.wait() for node in nodes] == [143, 143], "\n\n".join(node.text()[-2000:] for node in nodes)


def test_a_mistake_on_one_node_ends_the_other_with_its_status(start: Start, tmp_path: Path) -> None:
    """The first rank of all meets it after the start; the processes of the other node only wait."""
    port = free_port()
    (tmp_path / "run").mkdir()
    owner = FolderOwner(tmp_path / "run")
    with owner:  # only the first rank takes the folder
        nodes = [start_node(start, rank, port, f"node{rank}") for rank in range(2)]
        statuses = [node.wait(120) for node in nodes]
    said = "\n\n".join(node.text()[-2000:] for node in nodes)
    assert statuses == [2, 2], said
    assert said.count("another node has ended the run") == 1, said


@pytest.mark.slow
def test_sixteen_sigterms_of_sixteen_save(start: Start) -> None:
    """At random moments, in a save as well: through hgpt and through torchrun, eight each; says how many."""
    moments = random.Random(9)
    saved = 0
    for number in range(16):
        command = LAUNCHERS["torchrun" if number % 2 else "hgpt"][0]
        run = start("checkpoint.save_interval_steps=5", command=command, name=f"log{number}")
        run.wait_for("checkpoint saved")
        time.sleep(moments.uniform(0, 2))
        since_s = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        status = run.wait(60)
        step = re.findall(r"stopped by a signal after step (\d+)", run.text())[0]
        is_saved = run.steps()[-1] == f"step_{int(step):08d}" and status == (1 if number % 2 else 143)
        saved += is_saved
        line = f"{number}: step {step}, exit status {status}, {time.monotonic() - since_s:.1f} s, saved: {is_saved}"
        sys.stdout.write(line + "\n")
    assert saved == 16


@pytest.mark.skipif(
    importlib.util.find_spec("nvidia_resiliency_ext") is None or shutil.which("ft_launcher") is None,
    reason="nvidia-resiliency-ext is not installed",
)
def test_ft_launcher_restarts_a_rank_without_heartbeats(start: Start) -> None:
    run = start(
        command=[
            "ft_launcher", "--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint",
            f"localhost:{free_port()}", "--max-restarts", "2", "--ft-initial-rank-heartbeat-timeout", "100",
            "--ft-rank-heartbeat-timeout", "6", "--ft-workload-check-interval", "1", "--ft-enable-nic-monitor", "False",
            SCRIPT,
        ],
    )  # fmt: skip
    run.wait_for("checkpoint saved")
    os.kill(run.ranks()[1], signal.SIGSTOP)
    run.wait_for("resumed from")
