"""Checkpoint folders of an attacker through the commands that read them: refused in one line, and nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from megatron_hgpt.data.preprocess_run import preprocess_run
from megatron_hgpt.demo.checkpoints import write_tiny_clip, write_tiny_llama
from megatron_hgpt.demo.tokenizers import make_tiny_tokenizer
from megatron_hgpt.model_folders import load_resolved
from megatron_hgpt.testing.checkpoints import plant_in_object, seal_folder, write_as_format_2
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.text.tokenizer import TextTokenizer

ROOT = Path(__file__).resolve().parents[2]
STEP = Path("run") / "checkpoints" / "step_00000001"


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_hgpt", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit status and output of each."""
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def train(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return start("train", "--config", folder / "run.yaml", *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one step, and all that it names."""
    root = tmp_path_factory.mktemp("hostile")
    write_tiny_clip(root / "clip", num_layers=2)
    make_tiny_tokenizer(root / "lm")
    write_tiny_llama(root / "lm", text_vocab_size=TextTokenizer.load(root / "lm").vocab_size, num_layers=2)
    Image.new("RGB", (16, 16), "red").save(root / "0.png")
    turns = [{"from": "human", "value": "<image>\nIs it CT?"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": str(i), "image": "0.png", "conversations": turns} for i in range(4)]
    (root / "train.json").write_text(json.dumps(records))
    values = {
        "model": {
            "backbone": str(root / "lm"), "template": "phi3_instruct", "vision": {"tower": str(root / "clip")},
            "vq": {"num_codes": 4, "num_indices": 4},
        },
        "data": {"train": [str(root / "data")], "num_workers": 0},
        "training": {"stage": "stage1_comprehension", "num_steps": 1, "global_batch_size": 2, "micro_batch_size": 2},
        "logging": {"tensorboard": False},
        "output_dir": str(root / "run"),
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    preprocess_run(load_resolved(root / "run.yaml"), [root / "train.json"], root / "data")
    ((status, output),) = finish(train(root))
    assert status == 0, output
    return root


def old_format(root: Path) -> None:
    from megatron_hgpt import distributed
    from megatron_hgpt.config import ParallelConfig

    distributed.initialize(ParallelConfig(), seed=1)
    write_as_format_2(root / STEP, root / "old")
    shutil.rmtree(root / STEP)
    (root / "old").rename(root / STEP)


def in_metadata(root: Path, trap: Trap) -> None:
    metadata = pickle.loads((root / STEP / ".metadata").read_bytes())
    metadata.planner_data = {"x": trap}
    (root / STEP / ".metadata").write_bytes(pickle.dumps(metadata))


def plant(finished: Path, folder: Path, function: Callable[[Path, Trap], None], *, is_old: bool) -> Path:
    """A copy of the run with a trap in its checkpoint, whose checksums are right."""
    shutil.copytree(finished, folder)
    text = (folder / "run.yaml").read_text().replace(str(finished / "run"), str(folder / "run"))
    (folder / "run.yaml").write_text(text)
    if is_old:
        run_ranks(old_format, 1, folder)
    function(folder, Trap(folder / "ran"))
    if not is_old:
        seal_folder(folder / STEP)
    return folder


def commands(root: Path) -> dict[str, subprocess.Popen[str]]:
    """Everything that reads a checkpoint."""
    generate = ("--image", root / "0.png", "--question", "Is it CT?", "--max-new-tokens", "2")
    return {
        "generate": start("generate", "--checkpoint", root / "run", *generate),
        "evaluate": start("evaluate", "--checkpoint", root / "run", "--data", f"train={root / 'train.json'}",
                          "--output", root / "evaluation", "--max-vqa", "1"),
        "resume": train(root, "training.num_steps=2"),
        "init_from": train(root, f"output_dir={root / 'next'}", f"checkpoint.init_from=[{root / 'run'}]"),
    }  # fmt: skip


def test_a_planted_object_in_the_map_is_refused_by_every_command(finished: Path, tmp_path: Path) -> None:
    root = plant(finished, tmp_path / "c", in_metadata, is_old=False)
    processes = commands(root)
    for name, (status, output) in zip(processes, finish(*processes.values()), strict=True):
        assert status == 2, (name, output)
        assert "starting again" not in output, name
        assert "names posix.mkdir, which no checkpoint needs" in output, (name, output)
    assert not (root / "ran").exists()
    # The trap is one: torch's own reader makes the folder.
    with (root / STEP / ".metadata").open("rb") as stream:
        pickle.load(stream)
    assert (root / "ran").is_dir()


def test_a_planted_common_pt_of_format_2_is_never_read(finished: Path, tmp_path: Path) -> None:
    """megatron.core's loader reads it first, whatever is asked for."""
    root = plant(finished, tmp_path / "c", lambda root, trap: torch.save(trap, root / STEP / "common.pt"), is_old=True)
    processes = commands(root)
    for name, (status, output) in zip(processes, finish(*processes.values()), strict=True):
        assert status == 0, (name, output)
    assert not (root / "ran").exists()


def test_planted_random_states_of_format_2_are_refused(finished: Path, tmp_path: Path) -> None:
    root = plant(finished, tmp_path / "c", lambda root, trap: plant_in_object(root / STEP, trap), is_old=True)
    ((status, output),) = finish(train(root, "training.num_steps=2"))
    assert status == 2 and "starting again" not in output, output
    assert "trap.distcp is damaged: " in output and "use another checkpoint" in output
    assert not (root / "ran").exists()
