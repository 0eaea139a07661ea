"""The README's main command, small: every step of the demo in real processes, then a kill, a resume and bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_hgpt.testing.checkpoints import plain_tensors
from megatron_hgpt.testing.distributed import free_port

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}
SMALL = ["training.micro_batch_size=2", "training.global_batch_size=4", "logging.interval_steps=1"]


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder of a demo of three steps per stage, and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "out"
    result = run(
        sys.executable, ROOT / "tools" / "run_demo.py", "--output", output, "--vqgan-steps", "4", "--max-vqa", "6",
        "--max-images", "3", "training.num_steps=3", "logging.sample_images_interval_steps=3",
        "logging.num_sample_images=2", *SMALL,
    )  # fmt: skip
    return output, result.stdout


@pytest.fixture(scope="module")
def demo(finished: tuple[Path, str]) -> Path:
    return finished[0]


def test_the_demo_ends_with_its_figures_and_what_to_do_next(finished: tuple[Path, str]) -> None:
    output, printed = finished
    assert "question   What is the modality of this image?" in printed
    (expected,) = re.findall(r"^expected   (.+)$", printed, re.M)
    assert expected in ("CT", "MRI", "ultrasound", "microscopy", "fundus photography", "nuclear medicine")
    table = printed.split("== results of the trained model\n")[1].split("\n\n")[0].splitlines()
    assert [re.split(r"  +", line)[0] for line in table[1:4]] == ["train", "held-out pictures", "held-out wordings"]
    assert all(re.search(r"%\s+[\d.]+%", line) for line in table[1:4]), "each figure stands beside its baseline"
    commands = re.findall(r"^(?:ask|draw) +(.*)$", printed.split("== what to do next\n")[1], re.M)
    assert len(commands) == 2 and all(str(output.name) in command for command in commands)
    assert "docs/guide.md" in printed
    assert "{" not in printed.split("== 6/6")[1], "figures, not JSON"


def test_every_step_leaves_its_result(demo: Path) -> None:
    for stage in ("stage1", "stage2", "stage3"):
        steps = [json.loads(line)["step"] for line in (demo / stage / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3]
        assert (demo / stage / "checkpoints" / "step_00000003" / "healthgpt.json").is_file()
        assert list((demo / stage / "tensorboard").glob("events*"))
        assert json.loads((demo / stage / "summary.json").read_text())["steps"] == 3
    assert len(list((demo / "stage3" / "samples").rglob("*.png"))) == 2
    for split in ("train", "held-out-pictures", "held-out-wordings"):
        results = json.loads((demo / "evaluation" / split / "results.json").read_text())
        assert len(results["vqa"]) == 6
        assert len(results["images"]) == (0 if split == "held-out-wordings" else 3)
        assert results["summary"]["vqa"]["baseline_exact_match"] is not None
    html = (demo / "report.html").read_text()
    assert html.count("<img") > 9
    assert "stage3" in html


def test_a_second_run_has_nothing_left_to_train(demo: Path) -> None:
    before = (demo / "stage2" / "metrics.jsonl").read_text()
    config = demo / "stage2.yaml"
    run("bash", ROOT / "examples" / "pretrain_hgpt.sh", "--config", config, "training.num_steps=3", *SMALL)
    assert (demo / "stage2" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("packing", ["by_task", "mixed"])
def test_packing_fills_rows_of_2048_with_real_content(packing: str, demo: Path, tmp_path: Path) -> None:
    """Tokens per step, against the same rows with one sample each, padded to 2048."""
    run(
        "bash", ROOT / "examples" / "pretrain_hgpt.sh", "--config", demo / "stage3.yaml", f"output_dir={tmp_path}",
        "data.mixture={}", f"data.packing={packing}",
        "data.pack_length=2048", "training.micro_batch_size=1", "training.global_batch_size=2", "training.num_steps=2",
        "logging.sample_images_interval_steps=0",
    )  # fmt: skip
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        padded = 2 * step["num_tokens"] / step["num_samples"]  # two rows of one sample
        assert step["num_tokens"] >= 1.8 * padded
        assert step["padding_share"] < 0.01


@pytest.mark.parametrize("samples", ["0", "3"], ids=["without the tower", "with sample pictures"])
def test_cached_features_give_the_same_losses(samples: str, demo: Path, tmp_path: Path) -> None:
    run(sys.executable, ROOT / "tools" / "cache_features.py", "--config", demo / "stage3.yaml")
    run(
        "bash", ROOT / "examples" / "pretrain_hgpt.sh", "--config", demo / "stage3.yaml", f"output_dir={tmp_path}",
        "data.feature_cache=features", "training.num_steps=3", f"logging.sample_images_interval_steps={samples}",
        "logging.num_sample_images=2", *SMALL,
    )  # fmt: skip
    assert len(losses(demo / "stage3")) == 3
    assert losses(tmp_path) == pytest.approx(losses(demo / "stage3"), rel=1e-6)
    assert len(list((tmp_path / "samples").rglob("*.png"))) == (2 if samples == "3" else 0)


def test_one_question_and_one_picture(demo: Path, tmp_path: Path) -> None:
    records = json.loads((demo / "assets" / "vl_health_mini" / "test.json").read_text())
    image = demo / "assets" / "vl_health_mini" / records[0]["image"]
    generate = [sys.executable, ROOT / "tools" / "generate.py", "--checkpoint", demo / "stage3", "--image", image]
    answer = run(*generate, "--question", "What is the modality?", "--max-new-tokens", "4")
    assert answer.stdout.count("\n") == 1, "the answer alone"
    run(*generate, "--question", "Reconstruct the image.", "--draw", tmp_path / "out.png", "--temperature", "1")
    from PIL import Image

    assert Image.open(tmp_path / "out.png").size == (64, 64)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_nodes_meet_at_an_address(demo: Path, tmp_path: Path) -> None:
    """Two launchers, as on two machines: one process each, tensor parallel over both; the losses are the demo's."""
    command = [
        "bash", str(ROOT / "examples" / "pretrain_hgpt.sh"), "--config", str(demo / "stage3.yaml"), *SMALL,
        f"output_dir={tmp_path}", "training.num_steps=3", "logging.sample_images_interval_steps=0",
    ]  # fmt: skip
    nodes = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(free_port())}
    agents = [
        subprocess.Popen(
            command, cwd=ROOT, env={**ENVIRONMENT, **nodes, "NODE_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for agent in agents:
        _, errors = agent.communicate(timeout=600)
        assert agent.returncode == 0, errors[-3000:]
    assert losses(tmp_path) == pytest.approx(losses(demo / "stage3"), rel=1e-6)


def test_the_slurm_script_starts_a_run_on_two_nodes(demo: Path, tmp_path: Path) -> None:
    """`srun` and `scontrol` are stand-ins that start both tasks here; script, launchers and rendezvous are real."""
    commands = tmp_path / "bin"
    commands.mkdir()
    # Backgrounded tasks and their statuses, which is what srun does with one task per node.
    srun = '#!/bin/bash\n[ "$1 $2" = "--wait=120 --cpus-per-task=4" ] || exit 9\nshift 2\n'
    srun += 'SLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & second=$!\n'
    (commands / "srun").write_text(srun + "wait $first && wait $second\n")
    (commands / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.2\\nx\\n"\n'
    )
    for command in commands.iterdir():
        command.chmod(0o755)
    slurm = {
        "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "4", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    result = subprocess.run(
        [
            "bash", str(ROOT / "examples" / "slurm" / "pretrain_hgpt.sbatch"), "--config", str(demo / "stage3.yaml"),
            *SMALL, f"output_dir={tmp_path / 'run'}", "training.num_steps=3", "logging.sample_images_interval_steps=0",
        ],
        cwd=tmp_path, env={**ENVIRONMENT, **slurm}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(demo / "stage3"), rel=1e-6)


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(demo: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        *torchrun, str(ROOT / "examples" / "pretrain_hgpt.sh"), "--config", str(demo / "stage3.yaml"), *SMALL,
        "training.num_steps=20", "checkpoint.save_interval_steps=4", "logging.sample_images_interval_steps=0",
        "model.hlora.generation.dropout=0.1",
    ]  # fmt: skip
    run(*command, f"output_dir={tmp_path / 'whole'}")
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, f"output_dir={killed}"], cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (killed / "checkpoints" / "step_00000004").exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint within 300 s"
        time.sleep(0.02)
    ranks = psutil.Process(process.pid).children(recursive=True)  # in process groups of their own
    for rank in ranks:
        rank.kill()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(ranks) == 2
    assert not (killed / "checkpoints" / "step_00000020").exists(), "killed too late to show anything"
    run(*command, f"output_dir={killed}")
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))
    whole = plain_tensors(tmp_path / "whole" / "checkpoints" / "step_00000020")
    resumed = plain_tensors(killed / "checkpoints" / "step_00000020")
    assert whole.keys() == resumed.keys()
    assert any(".hlora." in name for name in whole)
    different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert different == []


BAD_INPUT = {
    "training.lrr=1": "did you mean",
    "parallel.tensor_model_parallel_size=3": "use 1, 2, 4",
    "model.hlora.generation.lora_rank=32": "belongs to another model",
    "model.template=qwen_2": "template",
    "data.train=[nowhere]": "hgpt preprocess",
}


@pytest.mark.parametrize("override", BAD_INPUT)
def test_bad_input_is_one_clear_line(override: str, demo: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "pretrain_hgpt.sh", "--config", demo / "stage3.yaml", *SMALL]
    single = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false", "training.num_steps=1"]
    result = run(*command, *single, f"output_dir={tmp_path}", override, check=False)
    assert result.returncode == 2
    assert BAD_INPUT[override] in result.stderr
    assert "Traceback" not in result.stderr
