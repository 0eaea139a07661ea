"""The README's main command, small: every step of the demo in real processes, then a kill, a resume and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hgpt.testing.distributed import run_ranks

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
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
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a demo of three steps per stage."""
    output = tmp_path_factory.mktemp("demo") / "out"
    run(
        sys.executable, ROOT / "tools" / "run_demo.py", "--output", output, "--vqgan-steps", "4", "--max-vqa", "6",
        "--max-images", "3", "training.num_steps=3", "logging.sample_images_interval_steps=3",
        "logging.num_sample_images=2", *SMALL,
    )  # fmt: skip
    return output


def test_every_step_leaves_its_result(demo: Path) -> None:
    for stage in ("stage1", "stage2", "stage3"):
        steps = [json.loads(line)["step"] for line in (demo / stage / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3]
        assert (demo / stage / "checkpoints" / "step_00000003" / "healthgpt.json").is_file()
        assert list((demo / stage / "tensorboard").glob("events*"))
        assert json.loads((demo / stage / "summary.json").read_text())["steps"] == 3
    assert len(list((demo / "stage3" / "samples").rglob("*.png"))) == 2
    for split in ("train", "held-out"):
        results = json.loads((demo / "evaluation" / split / "results.json").read_text())
        assert len(results["vqa"]) == 6
        assert len(results["images"]) == 3
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
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (demo / "stage3", tmp_path)
    ]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert len(list((tmp_path / "samples").rglob("*.png"))) == (2 if samples == "3" else 0)


def test_one_question_and_one_picture(demo: Path, tmp_path: Path) -> None:
    records = json.loads((demo / "assets" / "vl_health_mini" / "test.json").read_text())
    image = demo / "assets" / "vl_health_mini" / records[0]["image"]
    generate = [sys.executable, ROOT / "tools" / "generate.py", "--checkpoint", demo / "stage3", "--image", image]
    run(*generate, "--question", "What is the modality?", "--max-new-tokens", "4")
    run(*generate, "--question", "Reconstruct the image.", "--draw", tmp_path / "out.png", "--temperature", "1")
    from PIL import Image

    assert Image.open(tmp_path / "out.png").size == (64, 64)


def plain_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, whole."""
    from megatron_hgpt import distributed
    from megatron_hgpt.config import ParallelConfig

    distributed.initialize(ParallelConfig(), seed=1)
    from megatron.core import dist_checkpointing

    return {name: value.float().numpy() for name, value in dist_checkpointing.load_plain_tensors(str(folder)).items()}


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(demo: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        *torchrun, str(ROOT / "examples" / "pretrain_hgpt.sh"), "--config", str(demo / "stage3.yaml"), *SMALL,
        "training.num_steps=40", "checkpoint.save_interval_steps=4", "logging.sample_images_interval_steps=0",
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
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoints" / "step_00000040").exists(), "killed too late to show anything"
    run(*command, f"output_dir={killed}")
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
    (whole,) = run_ranks(plain_tensors, 1, tmp_path / "whole" / "checkpoints" / "step_00000040")
    (resumed,) = run_ranks(plain_tensors, 1, killed / "checkpoints" / "step_00000040")
    assert whole.keys() == resumed.keys()
    assert any(".hlora." in name for name in whole)
    different = [
        name for name in whole if not torch.equal(torch.from_numpy(whole[name]), torch.from_numpy(resumed[name]))
    ]
    assert different == []


BAD_INPUT = {
    "training.lrr=1": "did you mean",
    "parallel.tensor_model_parallel_size=3": "use 1, 2, 4",
    "model.hlora.generation.lora_rank=32": "belongs to another model",
    "model.template=qwen_2": "template",
    "data.train=[nowhere]": "tools/preprocess_vl_health.py",
}


@pytest.mark.parametrize("override", BAD_INPUT)
def test_bad_input_is_one_clear_line(override: str, demo: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "pretrain_hgpt.sh", "--config", demo / "stage3.yaml", *SMALL]
    single = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false", "training.num_steps=1"]
    result = run(*command, *single, f"output_dir={tmp_path}", override, check=False)
    assert result.returncode == 2
    assert BAD_INPUT[override] in result.stderr
    assert "Traceback" not in result.stderr
