"""HealthGPT end to end on real small medical images: data, models, three training stages, evaluation, one report.

Every step that a user has a command for runs as that command, in processes of its own. A second run continues where the
first stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hgpt.demo.assets import build_assets, say
from megatron_hgpt.demo.questions import EXAMPLE_QUESTION
from megatron_hgpt.demo.stage_configs import (
    INPUTS,
    ROOT,
    STAGES,
    check_before_building,
    claim_dataset,
    dataset_is_current,
    dataset_settings,
    model_section,
    write_stage_config,
)
from megatron_hgpt.demo.summary import example, next_steps
from megatron_hgpt.environment import environment_with
from megatron_hgpt.errors import HealthGPTError
from megatron_hgpt.evaluation.table import results_table
from megatron_hgpt.report.page import write_report

DEFAULT_OUTPUTS = {"tiny": Path("runs/demo"), "smollm2": Path("runs/demo-smollm2")}
"""Backbone -> where everything goes, below the working directory."""
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
    result = subprocess.run(command, cwd=ROOT, env=environment_with(environment), stdout=stdout, text=True)
    if result.returncode:
        raise StepError(command, result.returncode)
    return result


def preprocess(
    output: Path, stage_config: Path, overrides: Sequence[str], assets: Mapping[str, Any], folder: Path
) -> None:
    """Both splits into indexed mmap; skipped where the dataset was written from the same with the same settings."""
    for split, name in INPUTS.items():
        source, target = folder / assets[name], output / "data" / split
        settings = dataset_settings(stage_config, overrides, source)
        if dataset_is_current(target, settings):
            say(f"{target}: up to date, skipped")
            continue
        claim_dataset(target, {})
        call([sys.executable, str(ROOT / "tools" / "preprocess_vl_health.py"),
             "--config", str(stage_config),
             "--input", str(source), "--image-root", str(source.parent), "--output", str(target), "--overwrite",
             "--workers", "2", *overrides], OMP_NUM_THREADS="1")  # fmt: skip
        claim_dataset(target, settings)


def train(config: Path, overrides: Sequence[str]) -> None:
    """One stage through the launcher that users have."""
    call(["bash", str(ROOT / "examples" / "pretrain_hgpt.sh"), "--config", str(config), *overrides],
        PYTHON=sys.executable)  # fmt: skip


def evaluate(output: Path, assets: Mapping[str, Any], folder: Path, *, max_vqa: int, max_images: int) -> None:
    """All splits with the last stage's model; every core holds a whole model and a share of the samples."""
    processes = min(2, os.cpu_count() or 1)
    limits = [f"--max-vqa={max_vqa}", f"--max-images={max_images}"]
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


def run(
    *,
    backbone: str = "tiny",
    output: Path | None = None,
    vqgan_steps: int = 500,
    max_vqa: int = 120,
    max_images: int = 40,
    overrides: Sequence[str] = (),
) -> int:
    """Run every step.

    Args:
        backbone: ``"tiny"`` or ``"smollm2"``.
        output: folder of everything; None is `DEFAULT_OUTPUTS` of the backbone, below the working directory.
        vqgan_steps: optimizer steps of the VQGAN, at least 2.
        max_vqa, max_images: questions and pictures evaluated per split at most.
        overrides: ``key.sub=value`` changes to the configuration of every stage.

    Returns:
        Exit status: 0, or that of the step that failed.

    Raises:
        ConfigError: the overrides do not fit a stage; said before anything is built.
        DataError: a folder that the demo would replace is not its own.
    """
    output = (DEFAULT_OUTPUTS[backbone] if output is None else output).resolve()
    check_before_building(output, backbone, overrides)
    try:
        _run(output, backbone, overrides, vqgan_steps=vqgan_steps, max_vqa=max_vqa, max_images=max_images)
    except StepError as error:
        sys.stderr.write(f"{error}\n")
        return error.status
    return 0


def _run(
    output: Path, backbone: str, overrides: Sequence[str], *, vqgan_steps: int, max_vqa: int, max_images: int
) -> None:
    started = time.monotonic()
    announce("1/6 models and data: real images from installed packages, a tokenizer, a backbone, a tower, a VQGAN")
    folder = output / "assets"
    assets = build_assets(folder, backbone=backbone, vqgan_steps=vqgan_steps)
    model = model_section(assets, folder)
    configs = {stage: write_stage_config(output, backbone, stage, model, overrides) for stage in STAGES}
    announce("2/6 preprocessing: templates, label masks and VQ indices into indexed mmap files")
    preprocess(output, configs["stage1"], overrides, assets, folder)
    for i, stage in enumerate(STAGES):
        announce(f"{3 + i}/6 training {stage} (TensorBoard: {output / stage / 'tensorboard'})")
        train(configs[stage], overrides)
    announce("6/6 evaluation: training data, held-out pictures, held-out wordings; report")
    evaluate(output, assets, folder, max_vqa=max_vqa, max_images=max_images)
    folders = {split.replace("out-", "out "): output / "evaluation" / split for split in SPLITS}
    write_report(
        output / "report.html",
        runs=[output / stage for stage in STAGES],
        evaluations=folders,
        title="HealthGPT demo",
        notes={
            "Backbone": backbone,
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
