"""HealthGPT end to end on real small medical images: data, models, three training stages, evaluation, one report.

Every step that a user has a command for runs as that command, in processes of its own. A second run continues where the
first stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_hgpt.config_io import dump, load_config
from megatron_hgpt.demo.assets import build_assets, say
from megatron_hgpt.demo.questions import EXAMPLE_QUESTION
from megatron_hgpt.demo.summary import example, next_steps
from megatron_hgpt.errors import HealthGPTError
from megatron_hgpt.evaluation.table import results_table
from megatron_hgpt.files import write_atomic
from megatron_hgpt.report.page import write_report

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: the demo runs its commands and takes its configurations from there."""
STAGES = ("stage1", "stage2", "stage3")
SPLITS = {"train": "train", "held-out-pictures": "test", "held-out-wordings": "wordings"}
"""Name of an evaluated split -> its file's name among the assets."""


class StepError(HealthGPTError):
    """A command of the demo failed, and said why itself."""

    def __init__(self, command: list[str], status: int) -> None:
        super().__init__(f"step failed (exit status {status}): {' '.join(command)}")
        self.status = status


def announce(text: str) -> None:
    """A line that stands out between the output of the steps."""
    say(f"\n== {text}")


def call(command: list[str], *, stdout: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a step's command from the checkout, with variables added to the environment.

    Raises:
        StepError: it failed; it has printed its own message.
    """
    settings = [f"{name}={value}" for name, value in environment.items()]
    result = subprocess.run(["env", *settings, *command], cwd=ROOT, stdout=stdout, text=True)
    if result.returncode:
        raise StepError(command, result.returncode)
    return result


def model_section(assets: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The folders and sizes of the assets as a `model` section."""
    hf_config = json.loads((folder / assets["backbone"] / "config.json").read_text())
    return {
        "backbone": str(folder / assets["backbone"]),
        "tokenizer": str(folder / assets["tokenizer"]),
        "hf_config": hf_config,
        "vision": {"tower": str(folder / assets["tower"])},
        "vq": {"path": str(folder / assets["vqgan"])},
        "vocabulary": {"text_size": assets["text_vocab_size"]},
    }


def write_run_config(output: Path, backbone: str, stage: str, model: dict[str, Any], overrides: list[str]) -> Path:
    """The configuration of one stage over the shipped one; a changed configuration starts the stage afresh."""
    previous = {"stage1": None, "stage2": "stage1", "stage3": "stage2"}[stage]
    values = {
        "base": str(ROOT / "examples" / "configs" / f"{backbone}_{stage}.yaml"),
        "output_dir": str(output / stage),
        "model": model,
        "data": {"train": [str(output / "data" / "train")], "validation": [str(output / "data" / "held-out")]},
        "checkpoint": {"init_from": [str(output / previous)] if previous else []},
    }
    path = output / f"{stage}.yaml"
    text = yaml.safe_dump(values, sort_keys=False)
    write_atomic(path, text)
    resolved = dump(load_config(path, overrides))
    marker = output / stage / "demo_config.yaml"
    if (output / stage).exists() and (not marker.is_file() or marker.read_text() != resolved):
        shutil.rmtree(output / stage)
    write_atomic(marker, resolved)
    return path


def preprocess(output: Path, stage_config: Path, assets: dict[str, Any], folder: Path) -> None:
    """Both splits into indexed mmap; skipped where the dataset is newer than its inputs."""
    for split, name in (("train", "train"), ("held-out", "test")):
        source, target = folder / assets[name], output / "data" / split
        inputs = [source, folder / assets["vqgan"] / "last.ckpt", folder / assets["tokenizer"] / "tokenizer.json"]
        manifest = target / "manifest.json"
        if manifest.is_file() and all(
            manifest.stat().st_mtime > file.stat().st_mtime for file in inputs if file.exists()
        ):
            say(f"{target}: up to date, skipped")
            continue
        call([sys.executable, str(ROOT / "tools" / "preprocess_vl_health.py"),
             "--config", str(stage_config),
             "--input", str(source), "--image-root", str(source.parent), "--output", str(target), "--overwrite",
             "--workers", "2"], OMP_NUM_THREADS="1")  # fmt: skip


def train(config: Path, overrides: list[str]) -> None:
    """One stage through the launcher that users have."""
    call(["bash", str(ROOT / "examples" / "pretrain_hgpt.sh"), "--config", str(config), *overrides],
        PYTHON=sys.executable)  # fmt: skip


def evaluate(
    output: Path, assets: dict[str, Any], folder: Path, *, max_vqa: int | None, max_images: int | None
) -> None:
    """All splits with the last stage's model; every core holds a whole model and a share of the samples."""
    processes = min(2, os.cpu_count() or 1)
    limits = [
        f"--{name}={value}" for name, value in (("max-vqa", max_vqa), ("max-images", max_images)) if value is not None
    ]
    data = [option for split, name in SPLITS.items() for option in ("--data", f"{split}={folder / assets[name]}")]
    call([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
         str(ROOT / "tools" / "evaluate.py"), "--checkpoint", str(output / "stage3"),
         "--output", str(output / "evaluation"), "--baseline", str(folder / assets["train"]), *data, *limits],
        stdout=subprocess.DEVNULL,
        OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))  # fmt: skip


def ask(output: Path, image: Path, question: str) -> str:
    """One question through the command that a user has for it."""
    result = call([sys.executable, str(ROOT / "tools" / "generate.py"), "--checkpoint", str(output / "stage3"),
                   "--image", str(image), "--question", question], stdout=subprocess.PIPE,
                  OMP_NUM_THREADS="1")  # fmt: skip
    return result.stdout.strip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options; `run` takes what they parse to."""
    parser.add_argument("--backbone", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--output", type=Path, help="default: runs/demo (runs/demo-smollm2)")
    parser.add_argument("--vqgan-steps", type=int, default=500, help="optimizer steps of the VQGAN")
    parser.add_argument("--max-vqa", type=int, default=120, help="questions evaluated per split at most")
    parser.add_argument("--max-images", type=int, default=40, help="pictures evaluated per split at most")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to every stage's configuration")


def run(arguments: argparse.Namespace) -> int:
    """Run every step; returns the exit status (that of the step that failed)."""
    try:
        _run(arguments)
    except StepError as error:
        sys.stderr.write(f"{error}\n")
        return error.status
    return 0


def _run(arguments: argparse.Namespace) -> None:
    output: Path = (
        arguments.output or ROOT / "runs" / ("demo" if arguments.backbone == "tiny" else "demo-smollm2")
    ).resolve()
    started = time.monotonic()
    announce("1/6 models and data: real images from installed packages, a tokenizer, a backbone, a tower, a VQGAN")
    folder = output / "assets"
    assets = build_assets(folder, backbone=arguments.backbone, vqgan_steps=arguments.vqgan_steps)
    model = model_section(assets, folder)
    configs = {
        stage: write_run_config(output, arguments.backbone, stage, model, arguments.overrides) for stage in STAGES
    }
    announce("2/6 preprocessing: templates, label masks and VQ indices into indexed mmap files")
    preprocess(output, configs["stage1"], assets, folder)
    for i, stage in enumerate(STAGES):
        announce(f"{3 + i}/6 training {stage} (TensorBoard: {output / stage / 'tensorboard'})")
        train(configs[stage], arguments.overrides)
    announce("6/6 evaluation: training data, held-out pictures, held-out wordings; report")
    evaluate(output, assets, folder, max_vqa=arguments.max_vqa, max_images=arguments.max_images)
    folders = {split.replace("out-", "out "): output / "evaluation" / split for split in SPLITS}
    write_report(
        output / "report.html",
        runs=[output / stage for stage in STAGES],
        evaluations=folders,
        title="HealthGPT demo",
        notes={
            "Backbone": arguments.backbone,
            "Wall time": f"{time.monotonic() - started:.0f} s on {os.cpu_count()} cores",
        },
    )
    image, modality = example((folder / assets["test"]).parent)
    announce("one question about a held-out picture")
    say(f"picture    {image}\nquestion   {EXAMPLE_QUESTION}\nanswer     {ask(output, image, EXAMPLE_QUESTION)}")
    say(f"expected   {modality}")
    announce("results of the trained model")
    say(results_table(folders))
    announce("what to do next")
    say(next_steps(output, image))
    say(f"\nwall time: {time.monotonic() - started:.0f} s")
