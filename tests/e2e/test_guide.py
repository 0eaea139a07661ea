"""docs/guide.md at tiny size: every command of it is parsed, and run in a folder such as the guide describes.

Running them all is slow (`make test-slow`): eight trainings of two processes and a dozen other commands, of which
most import torch; three to six minutes on two cores. Parsing them is part of every test run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
PICTURES = 24
SHELL = """
set -euo pipefail
hgpt() {
    if [ "$1" = train ]; then
        "$PYTHON" -m megatron_hgpt "$@" training.num_epochs=null training.num_steps=2 training.precision=fp32 \\
            training.micro_batch_size=2 training.global_batch_size=4
    elif [ "$1" = train-vqgan ]; then
        "$PYTHON" -m megatron_hgpt "$@" --steps 4 --num-codes 64
    else
        "$PYTHON" -m megatron_hgpt "$@"
    fi
}
"""
"""What the guide's commands mean here: this Python, runs of two steps, and a VQGAN of four."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.S | re.M)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line]


def test_the_guide_names_every_step() -> None:
    text = "\n".join(commands())
    for command in ("train-vqgan", "config", "preprocess", "train", "evaluate", "generate", "report"):
        assert f"hgpt {command} " in text
    assert len(blocks("yaml")) == 1 and len(blocks("json")) == 1
    from megatron_hgpt.stages import STAGES

    assert all(line.startswith("hgpt ") for line in commands()), "they run from a user's own folder"
    named = set(re.findall(r"training\.stage=(\w+)", text))
    assert named == set(STAGES), "the guide shows every stage"


@pytest.mark.parametrize(
    "command", [line for line in commands() if line.startswith("hgpt ")], ids=lambda line: line[:60]
)
def test_each_command_parses(command: str, tmp_path: Path) -> None:
    """Options exist, overrides are known keys with values of their type."""
    from megatron_hgpt.cli import frame

    _, name, *arguments = shlex.split(command)
    parsed = frame.build_parser(name).parse_intermixed_args(arguments)
    from megatron_hgpt.config_io import load_config

    if name == "train":
        (tmp_path / "run.yaml").write_text(blocks("yaml")[0])
        load_config(tmp_path / "run.yaml", parsed.overrides)


def record(i: int, split: str) -> list[dict[str, Any]]:
    """A question and a drawing about picture `i`."""
    image = f"ct_{i:03d}.png"
    question = {"from": "human", "value": "<image>\nWhat is the modality of this image?"}
    drawing = {"from": "human", "value": "<image>\nConvert this CT to MRI."}
    return [
        {"id": f"{split}-q{i}", "image": image, "conversations": [question, {"from": "gpt", "value": "CT"}]},
        {
            "id": f"{split}-g{i}", "task": "generation", "image": image, "target_image": f"mr_{i:03d}.png",
            "conversations": [drawing, {"from": "gpt", "value": ""}],
        },
    ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/ and data/ of the guide; models/vqgan is left to its own step."""
    from megatron_hgpt.demo.checkpoints import write_tiny_clip, write_tiny_phi3
    from megatron_hgpt.demo.tokenizers import make_tiny_tokenizer

    folder = tmp_path_factory.mktemp("guide")
    images = folder / "data" / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(PICTURES):
        for kind in ("ct", "mr"):
            Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
                images / f"{kind}_{i:03d}.png"
            )
    splits = {"train": range(4, PICTURES), "test": range(4)}
    for split, numbers in splits.items():
        records = [r for i in numbers for r in record(i, split)]
        (folder / "data" / f"{split}.json").write_text(json.dumps(records))
    write_tiny_phi3(folder / "models" / "language_model", text_vocab_size=512, initializer_range=0.1, num_layers=2)
    make_tiny_tokenizer(folder / "models" / "language_model", vocab_size=512)
    write_tiny_clip(folder / "models" / "vision_tower")
    (folder / "run.yaml").write_text(blocks("yaml")[0])
    return folder


def test_the_guides_records_are_records(world: Path, tmp_path: Path) -> None:
    from megatron_hgpt.evaluation.runner import read_samples

    (tmp_path / "guide.json").write_text(blocks("json")[0])
    for name in ("ct_001.png", "mr_001.png"):
        (tmp_path / name).write_bytes((world / "data" / "images" / name).read_bytes())
    samples, skipped = read_samples(tmp_path / "guide.json", tmp_path)
    assert ([sample.task.value for sample in samples], skipped) == (["comprehension", "generation"], {})


@pytest.mark.slow
def test_every_command_runs(world: Path) -> None:
    """Three to six minutes on two cores: the only test in which the guide's commands meet each other's files."""
    environment = {
        **os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    printed = []
    for block in blocks("bash"):
        result = subprocess.run(
            ["bash", "-c", SHELL + block], cwd=world, env=environment, capture_output=True, text=True, timeout=1500
        )
        assert result.returncode == 0, block + result.stdout[-2000:] + result.stderr[-4000:]
        printed.append(result.stdout)
    runs = world / "runs"
    for name in ("stage1", "stage2", "stage3", "p1c", "p1g", "p2", "p3c", "p3g"):
        assert json.loads((runs / name / "summary.json").read_text())["steps"] == 2
    summary = json.loads((runs / "evaluation" / "held-out" / "results.json").read_text())["summary"]
    assert summary["vqa"]["num_questions"] == 4 and summary["vqa"]["baseline_exact_match"] == 1.0
    assert Image.open(runs / "drawn.png").size == (64, 64)
    assert "stage3_joint" in (runs / "report.html").read_text()
