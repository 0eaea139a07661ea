"""examples/pretrain_hgpt.sh is bash and Python at once; every way to start it is started here."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hgpt.config import LaunchConfig

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "examples" / "pretrain_hgpt.sh"
CONFIG = ROOT / "examples" / "configs" / "tiny_stage1.yaml"
# What torchrun's own processes would inherit from a test run under torchrun.
CLEAN = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH", "NNODES")}
ENVIRONMENT = {**CLEAN, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("script", ["pretrain_hgpt.sh", "slurm/pretrain_hgpt.sbatch"])
def test_bash_accepts_it(script: str) -> None:
    result = run("bash", "-n", ROOT / "examples" / script)
    assert (result.returncode, result.stderr) == (0, "")


def test_python_accepts_it() -> None:
    compile(LAUNCHER.read_text(encoding="utf-8"), str(LAUNCHER), "exec")


def test_bash_from_another_folder(tmp_path: Path) -> None:
    result = run("bash", LAUNCHER, "--config", CONFIG, "--dry-run", "training.seed=77", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "seed: 77" in result.stdout
    assert "processes                       2\n" in result.stdout  # the tensor parallel size, on a CPU


def test_a_dry_run_counts_the_processes_that_would_start() -> None:
    result = run("bash", LAUNCHER, "--config", CONFIG, "--dry-run", "training.micro_batch_size=4", NPROC_PER_NODE="4",
                 NNODES="2")  # fmt: skip
    assert "processes                       8\n" in result.stdout
    assert "data parallel size              4\n" in result.stdout


def test_torchrun_starts_it_as_written() -> None:
    """`torchrun --nproc-per-node 2 examples/pretrain_hgpt.sh …`; one of the two processes prints."""
    result = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                 "examples/pretrain_hgpt.sh", "--config", CONFIG, "--dry-run", "name=literal")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("name: literal") == 1
    assert "processes                       2\n" in result.stdout


MISTAKES = {
    "a wrong key": (["training.sed=1"], "did you mean training.seed?"),
    "a wrong value": (["training.seed=x"], "training.seed='x'"),
    "a missing folder": (["data.train=[nowhere]"], "data.train: nowhere"),
}


def test_help() -> None:
    assert "--dry-run" in run("bash", LAUNCHER, "--help").stdout


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_from_the_launcher(mistake: str, tiny_run: Path) -> None:
    arguments, message = MISTAKES[mistake]
    done = run("bash", LAUNCHER, "--config", tiny_run, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_of_rank_0_under_torchrun(mistake: str, tiny_run: Path) -> None:
    """torchrun itself then reports the failed process, which its children cannot prevent, and ends with the message.

    It raises ChildFailedError for every exit status but 0, in its own process and outside of any hook: what a child
    can do is to leave the file that the report quotes, and not to be one failure more.
    """
    arguments, message = MISTAKES[mistake]
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "examples/pretrain_hgpt.sh", "--config", tiny_run, *arguments)  # fmt: skip
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert message in lines[0] and not lines[0].startswith("rank"), done.stderr
    ours = [line for line in lines if "Error: " in line and message in line]
    assert ours[1:] == [f"  traceback : {lines[0]}"]
    assert lines[-2] == ours[1]


def test_a_mistake_that_only_the_processes_find_is_one_line(tiny_run: Path, tmp_path: Path) -> None:
    """A checkpoint that is none is noticed when its weights are loaded, in both processes under our own torchrun."""
    (tmp_path / "step_1").mkdir()
    done = run("bash", LAUNCHER, "--config", tiny_run, "parallel.tensor_model_parallel_size=2",
               "checkpoint.init_from=[step_1]", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2, done.stderr
    ends = [line for line in done.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]  # the log's lines
    assert len(ends) == 1 and ends[0].startswith("CheckpointError: step_1"), done.stderr


def test_a_real_run_says_no_warning_of_a_library(tiny_run: Path, tmp_path: Path) -> None:
    """Training under two layouts, resuming, and generating: what torch and megatron.core announce is silenced."""
    output = f"output_dir={tmp_path / 'run'}"
    for arguments, environment in (
        (["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"], {}),
        (["parallel.use_distributed_optimizer=true", "training.num_steps=3"], {"NPROC_PER_NODE": "2"}),
    ):
        done = run("bash", LAUNCHER, "--config", tiny_run, output, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        assert not re.search(r"\w*Warning: |^\[[WE]|^[WE]\d{4} ", done.stderr, re.M), done.stderr
    asked = run(sys.executable, "-m", "megatron_hgpt", "generate", "--checkpoint", tmp_path / "run", "--question",
                "CT?", "--image", tiny_run.parent / "a.png", "--max-new-tokens", "2")  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert "Warning" not in asked.stderr
    assert not re.search(r"^\d\d:\d\d:\d\d ", asked.stdout, re.M) and "step_00000003" in asked.stderr


def test_a_crash_keeps_its_traceback(tiny_run: Path, tmp_path: Path) -> None:
    """What is no user's mistake is not made small: exit status 1 and the traceback of the process."""
    started = (
        "import sys\nif '-u' in sys.orig_argv: sys.modules['megatron_hgpt.trainer'] = None\n"  # torchrun's children
    )
    (tmp_path / "sitecustomize.py").write_text(started)
    done = run("bash", LAUNCHER, "--config", tiny_run, "parallel.tensor_model_parallel_size=2",
               "launch.max_restarts=0", PYTHONPATH=str(tmp_path), cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr
    assert re.search(r"error: rank [01] failed \(exit status 1\); start again to resume", done.stderr)


def test_bash_replaces_itself_by_the_command(tmp_path: Path) -> None:
    """A stand-in for Python records the command line; the checkout is first on the path of what it starts."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "PATH0=${PYTHONPATH%%:*}" "$@"\n')
    python.chmod(0o755)
    recorded = run("bash", LAUNCHER, "a.b=c d", PYTHON=str(python)).stdout.splitlines()
    assert recorded == [f"PATH0={ROOT}", "-m", "megatron_hgpt", "train", "a.b=c d"]


def test_without_arguments_it_runs_the_demo(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    result = run("bash", LAUNCHER, PYTHON=str(python))
    assert result.stdout.splitlines() == ["-m", "megatron_hgpt", "demo"]
    assert "running the demo" in result.stderr


def test_signals_reach_the_started_process(tmp_path: Path) -> None:
    """The shell is replaced, not kept as a parent: who signals the launcher signals torchrun."""
    python = tmp_path / "python"
    # It ends by itself: a launcher that kept the signal to itself fails here and leaves nothing behind.
    python.write_text(
        "#!/bin/bash\ntrap 'echo got TERM; exit 7' TERM\necho ready\n"
        "for i in {1..200}; do sleep 0.05; done\necho no signal came\n"
    )
    python.chmod(0o755)
    environment = {**ENVIRONMENT, "PYTHON": str(python), "NPROC_PER_NODE": "1"}
    with subprocess.Popen(["bash", LAUNCHER, "a.b=c"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "got TERM\n"
        assert process.wait(timeout=20) == 7


def test_spawned_workers_import_it_again_without_starting_a_run(tmp_path: Path) -> None:
    """A process that a library spawns imports the main file, whatever its extension, under another name."""
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import multiprocessing, os, sys\n"
        "if __name__ == '__main__':\n"
        f"    sys.modules['__main__'].__file__ = {str(LAUNCHER)!r}\n"
        "    sys.argv = ['pretrain_hgpt.sh', '--preset', 'no such preset']\n"  # a started run would exit with 2
        "    process = multiprocessing.get_context('spawn').Process(target=print, args=('the worker works',))\n"
        "    process.start()\n"
        "    process.join()\n"
        "    sys.exit(process.exitcode)\n"
    )
    result = run(sys.executable, parent, PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stdout) == (0, "the worker works\n"), result.stderr


def slurm(tmp_path: Path, srun: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The batch script with stand-ins for Slurm's commands."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    scontrol = f'if [ "$1" = show ]; then printf "node-a\\nnode-b\\n"; else echo "$@" >> {tmp_path}/requeued; fi'
    for name, body in {"scontrol": scontrol, "srun": srun}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    # Slurm runs a copy of the script from its own spool folder.
    script = Path(shutil.copy(ROOT / "examples" / "slurm" / "pretrain_hgpt.sbatch", tmp_path / "slurm_script"))
    return run("bash", script, "--config", "x.yaml", "a.b=c", cwd=tmp_path, PATH=f"{folder}:{os.environ['PATH']}",
               SLURM_JOB_NODELIST="node-[a-b]", SLURM_NNODES="2", SLURM_JOB_ID="42", SLURM_GPUS_ON_NODE="8",
               SLURM_SUBMIT_DIR=str(ROOT), SLURM_CPUS_PER_TASK="64", **environment)  # fmt: skip


def test_slurm_starts_one_hgpt_train_per_node(tmp_path: Path) -> None:
    """Stand-ins for Slurm's commands: what srun would run."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$NNODES $NODE_RANK $NPROC_PER_NODE $MASTER_ADDR:$MASTER_PORT" "$@"\n')
    python.chmod(0o755)
    srun = 'printf "%s\\n" "$1 $2"\nshift 2\nSLURM_NODEID=1 exec "$@"'
    result = slurm(tmp_path, srun, PYTHON=str(python))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "--wait=120 --cpus-per-task=64", "2:2 1 8 node-a:29500", "-m", "megatron_hgpt", "train", "--config", "x.yaml",
        "a.b=c",
    ]  # fmt: skip
    lost = slurm(tmp_path, srun, PYTHON=str(python), MIN_NODES="1").stdout.splitlines()
    assert lost[:2] == ["--wait=0 --cpus-per-task=64", "1:2 1 8 node-a:29500"]
    settings = (ROOT / "examples" / "slurm" / "pretrain_hgpt.sbatch").read_text(encoding="utf-8")
    (notice_s,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", settings, re.M)
    assert 120 <= LaunchConfig().grace_s < int(notice_s)
    assert "\n#SBATCH --open-mode=append\n" in settings, "a requeued job would overwrite its log"


REQUEUED = {
    "finished": (0, {}, False),
    "a mistake": (2, {}, False),
    "diverged": (3, {}, False),
    "stopped long before its end": (143, {"SLURM_JOB_END_TIME": "9999999999"}, False),
    "out of time": (143, {"SLURM_JOB_END_TIME": "1000"}, True),
    # Slurm sends its signal up to a minute earlier than it is told.
    "out of time, told early": (143, {"SLURM_JOB_END_TIME": str(int(time.time()) + 370)}, True),
    "hung": (75, {}, True),
    "killed": (137, {"SLURM_RESTART_COUNT": "4"}, True),
    "killed too often": (137, {"SLURM_RESTART_COUNT": "5"}, False),
}


@pytest.mark.parametrize("case", REQUEUED)
def test_slurm_requeues_what_that_helps(case: str, tmp_path: Path) -> None:
    status, environment, is_requeued = REQUEUED[case]
    result = slurm(tmp_path, f"exit {status}", **environment)
    assert result.returncode == status
    assert (tmp_path / "requeued").exists() is is_requeued, result.stderr
    if is_requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 42\n" and "resume from the newest" in result.stderr


@pytest.mark.parametrize(("grace_s", "saved"), [("1", False), ("60", True)])
def test_a_torchrun_of_the_user_waits_as_long_as_it_is_told(grace_s: str, saved: bool, tmp_path: Path) -> None:
    """A process that needs 3 s to save after SIGTERM lives exactly where TORCH_ELASTIC_SHUTDOWN_TIMEOUT allows it."""
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def save(*_):\n    time.sleep(3)\n    (folder / 'saved').touch()\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n(folder / 'ready').touch()\n"
        "while True:\n    time.sleep(0.1)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(script)]
    environment = {**ENVIRONMENT, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": grace_s}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as torchrun:
        deadline = time.monotonic() + 100
        while not (tmp_path / "ready").exists():
            assert torchrun.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        torchrun.send_signal(signal.SIGTERM)
        torchrun.wait(timeout=100)
    assert (tmp_path / "saved").exists() is saved
