"""Which ends of processes are started again: the launcher around processes that end as a script tells them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hgpt.checkpoint.description import publication_of
from megatron_hgpt.cli.supervisor import Patience, in_words
from megatron_hgpt.config import LaunchConfig
from megatron_hgpt.testing.distributed import free_port

ROOT = Path(__file__).parents[3]

DESCRIPTION = {
    "format_version": 2, "stage": "stage2", "trained_groups": [], "optimizer_steps": {}, "loader": {"step": 1},
    "rng_layout": [1, 1, 1], "fingerprint": {}, "base": {},
}  # fmt: skip
"""Of a checkpoint without checksums; its step and its publication are left out."""

PROCESS = (
    f"DESCRIPTION = {DESCRIPTION}"
    + """
import json, os, pathlib, signal, sys, time
rank, folder = os.environ["RANK"], pathlib.Path.cwd()
count = len(list(folder.glob(f"started_{rank}_*")))
(folder / f"started_{rank}_{count}").touch()
status, step, *delay_s = json.loads((folder / "script.json").read_text())[rank][count]
if step:
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    info = {**DESCRIPTION, "step": step, "publication": count}
    (checkpoint / "healthgpt.json").write_text(json.dumps(info))
time.sleep(sum(delay_s))
os.kill(os.getpid(), -status) if status < 0 else os._exit(status)
"""
)

LAUNCHER = """
import os, sys
from pathlib import Path
from megatron_hgpt.cli.frame import configure_logging
from megatron_hgpt.cli.processes import run_processes
from megatron_hgpt.config import LaunchConfig, RunConfig
from megatron_hgpt.environment import Nodes
configure_logging(20)
os.environ["PYTHONPATH"] = ""
for case in sys.argv[2:]:
    os.chdir(case)
    config = RunConfig(output_dir=".", launch=LaunchConfig(max_restarts=2, restart_backoff_s=0.01))
    (Path(case) / "status").write_text(str(run_processes(int(sys.argv[1]), Nodes(), [], config)))
"""

CASES = {
    # name: (per rank (exit status, step of a checkpoint that it leaves, seconds until it ends) of each start, status,
    # starts)
    "finished": ([[(0, 0)], [(0, 0)]], 0, 1),
    "a mistake": ([[(2, 0)], [(0, 0)]], 2, 1),
    "diverged": ([[(3, 0)], [(3, 0)]], 3, 1),
    "stopped and saved": ([[(143, 0)], [(143, 0)]], 143, 1),
    "stopped by hand and saved": ([[(130, 0)], [(130, 0)]], 130, 1),
    "hung": ([[(75, 0), (0, 0)], [(75, 0), (0, 0)]], 0, 2),
    "killed": ([[(0, 0), (0, 0)], [(-9, 0), (0, 0)]], 0, 2),
    "a mistake that a kill caused": ([[(2, 0), (0, 0)], [(-9, 0), (0, 0)]], 0, 2),
    "a mistake whose peer fails for want of it": ([[(2, 0)], [(1, 0)]], 2, 1),
    "a mistake that is said after its peer failed": ([[(2, 0, 1.5)], [(1, 0)]], 2, 1),
    "always": ([[(1, 0)] * 3, [(1, 0)] * 3], 1, 3),
    "always killed": ([[(-9, 0)] * 3, [(-9, 0)] * 3], 137, 3),
    "with progress": ([[(1, n) for n in (1, 2, 3, 4)] + [(0, 0)], [(1, 0)] * 4 + [(0, 0)]], 0, 5),
    # A run that went back publishes lower steps.
    "with progress below": ([[(1, n) for n in (9, 8, 7, 6)] + [(0, 0)], [(1, 0)] * 4 + [(0, 0)]], 0, 5),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All cases in one launcher, one after the other; and what it said."""
    folder = tmp_path_factory.mktemp("cases")
    for name, (script, _, _) in CASES.items():
        (folder / name / "megatron_hgpt").mkdir(parents=True)
        (folder / name / "megatron_hgpt" / "__init__.py").touch()
        (folder / name / "megatron_hgpt" / "__main__.py").write_text(PROCESS)
        (folder / name / "script.json").write_text(json.dumps({str(rank): ends for rank, ends in enumerate(script)}))
    command = [sys.executable, "-c", LAUNCHER, "2", *(str(folder / name) for name in CASES)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_what_is_started_again(name: str, launched: tuple[Path, str]) -> None:
    folder = launched[0] / name
    _, status, starts = CASES[name]
    assert int((folder / "status").read_text()) == status
    # The agent may end a process before that has begun.
    assert max(len(list(folder.glob(f"started_{rank}_*"))) for rank in (0, 1)) == starts


def test_what_is_said(launched: tuple[Path, str]) -> None:
    text = launched[1]
    assert "rank 1 was killed by SIGKILL; starting again from the beginning in 0 s (1 of 2)" in text
    assert "rank 0 was ended by the trainer (a hang, exit status 75); starting again" in text
    assert "rank 0 failed (exit status 1); starting again from step_00000004 in 0 s (1 of 2)" in text
    end = "2 restarts in a row brought no newer checkpoint (launch.max_restarts); start again to resume"
    assert f"rank 0 failed (exit status 1); {end}" in text
    assert "Traceback" not in text and "torch.distributed" not in text


NODE = """
import os, sys
from megatron_hgpt.cli.frame import configure_logging
from megatron_hgpt.cli.processes import run_processes
from megatron_hgpt.config import LaunchConfig, RunConfig
from megatron_hgpt.environment import Nodes
configure_logging(20)
os.environ["PYTHONPATH"] = ""
os.chdir(sys.argv[3])
rank, port = map(int, sys.argv[1:3])
nodes = Nodes(num_nodes=2, min_nodes=2, node_rank=rank, master_addr="127.0.0.1", master_port=port)
sys.exit(run_processes(1, nodes, [], RunConfig(output_dir=".", launch=LaunchConfig(max_restarts=2))))
"""


def test_a_node_at_work_hears_that_another_ended_for_good(tmp_path: Path) -> None:
    """Its own process would wait for the others until a time limit."""
    package = tmp_path / "megatron_hgpt"
    package.mkdir()
    (package / "__init__.py").touch()
    script = (
        "import os, pathlib, time\nrank = os.environ['RANK']\npathlib.Path('started_' + rank).touch()\n"
        "while not pathlib.Path('started_1').exists(): time.sleep(0.05)\n"
        "time.sleep(300 if rank == '1' else 1)\nos._exit(3)\n"
    )
    (package / "__main__.py").write_text(script)
    environment, port = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, str(free_port())
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", NODE, str(rank), port, str(tmp_path)], env=environment, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [node.communicate(timeout=90)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [3, 3], said
    assert "".join(said).count("another node has ended the run, and says why") == 1, said
    assert "Traceback" not in "".join(said) and "starting again" not in "".join(said)


def test_a_signal_between_two_starts_is_a_line(tmp_path: Path) -> None:
    """While no process runs there is nothing to save, and nothing to ask."""
    wait = f"""
import signal, os, torch.distributed.elastic.multiprocessing.api as api
from megatron_hgpt.cli import processes
from megatron_hgpt.config import RunConfig
from megatron_hgpt.environment import Nodes
signal.signal(signal.SIGTERM, api._terminate_process_handler)
processes._supervise = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
print(processes.run_processes(1, Nodes(), [], RunConfig(output_dir={str(tmp_path)!r})))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", wait], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "143\n" and "stopped by signal 15 between two starts" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_patience_waits_twice_as_long_each_time_and_begins_anew_with_progress(tmp_path: Path) -> None:
    patience = Patience(LaunchConfig(max_restarts=7, restart_backoff_s=10), tmp_path)
    assert [patience.pause_s() for _ in range(8)] == [10, 20, 40, 80, 160, 300, 300, None]
    publish(tmp_path, 5, 0)
    assert patience.pause_s() == 10
    (tmp_path / "step_00000006").mkdir()  # what cannot be read is no progress
    assert patience.pause_s() == 20
    shutil.rmtree(tmp_path / "step_00000005")  # nor is a damaged one that was set aside
    assert patience.pause_s() == 40
    publish(tmp_path, 4, 1)
    assert patience.pause_s() == 10


def publish(folder: Path, step: int, publication: int) -> None:
    (folder / f"step_{step:08d}").mkdir()
    info = {**DESCRIPTION, "step": step, "publication": publication}
    (folder / f"step_{step:08d}" / "healthgpt.json").write_text(json.dumps(info))
    assert publication_of(folder / f"step_{step:08d}") == publication


def test_ends_in_words() -> None:
    assert in_words(-11) == "was killed by SIGSEGV"
    assert in_words(1) == "failed (exit status 1)"
