"""What a run says before its first step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hgpt.config import ParallelConfig, RunConfig
from megatron_hgpt.distributed import DistributedContext
from megatron_hgpt.hooks.header import header_lines
from megatron_hgpt.model.parameter_counts import count_parameters, count_trained
from megatron_hgpt.samples import Task
from megatron_hgpt.stages import STAGES
from megatron_hgpt.testing.models import NUM_CODES, tiny_config, write_backbone

CONTEXT = DistributedContext(
    device=torch.device("cpu"), rank=0, world_size=4, tp_rank=0, tp_size=2, pp_rank=0, pp_size=1, dp_rank=0, dp_size=2
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "phi3")


def _header(config: RunConfig, *, validation: Any = None) -> dict[str, str]:
    loader: Any = SimpleNamespace(num_samples={Task.COMPREHENSION: 1200, Task.GENERATION: 80}, epoch_size=1280)
    headline, *rows = header_lines(
        config,
        CONTEXT,
        layers="local layers",
        parameters=count_parameters(config.model),
        trained=_trained(config),
        total_steps=400,
        loader=loader,
        validation=validation,
    )
    assert headline == f"tiny: training {config.training.stage}"
    assert all(row.startswith("  ") and row[13] == " " and row[14] != " " for row in rows), rows
    return {row[2:14].strip(): row[14:] for row in rows}


def test_everything_that_a_user_asks_first(backbone: Path, tmp_path: Path) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    config = tiny_config(backbone, tmp_path / "out", parallel=parallel)
    config.data.train, config.data.validation = ["/data/a", "/data/b"], ["/data/held-out"]
    config.training.validation_interval_steps = 50
    config.checkpoint.init_from = ["runs/stage2"]
    rows = _header(config, validation=SimpleNamespace(num_samples={Task.GENERATION: 9}))
    total, trained = sum(count_parameters(config.model).values()), sum(_trained(config).values())
    assert rows.pop("trained").startswith(f"{trained:,} ({trained / total:.2%}): abstract_adapter ")
    frozen = rows.pop("frozen")
    assert frozen.startswith(f"{total - trained:,} (") and "backbone" in frozen and "hlora" not in frozen
    assert rows == {
        "layout": "4 processes on cpu: tensor 2 with sequence parallelism x pipeline 1 x context 1 x data 2",
        "starts from": "runs/stage2",
        "precision": "fp32",
        "layers": "local layers",
        "data": "1,200 comprehension and 80 generation samples in /data/a, /data/b; not packed",
        "validation": "9 generation samples in /data/held-out, every 50 steps and after the last",
        "batch": "8 samples per step = micro-batch of 2 x 2 accumulated x 2 data-parallel",
        "length": "400 steps = 3,200 samples drawn = 2.5 epochs of 1,280",
        "checkpoints": f"{tmp_path}/out/checkpoints, every 1,000 steps, newest 2 kept",
        "metrics": f"{tmp_path}/out: metrics.jsonl, validation.jsonl, summary.json, resolved_config.yaml",
        "TensorBoard": f"tensorboard --logdir {tmp_path}/out/tensorboard",
    }


def _trained(config: RunConfig) -> dict[str, int]:
    return count_trained(config.model, STAGES[config.training.stage].trainable)


def test_packing_and_no_validation(backbone: Path, tmp_path: Path) -> None:
    config = tiny_config(backbone, tmp_path)
    config.data.packing, config.logging.tensorboard = "mixed", False
    rows = _header(config)
    assert rows["data"].endswith("; packed mixed into rows of 64 tokens")
    assert rows["batch"].startswith("8 packed rows per step")
    assert rows["length"] == "400 steps = 3,200 packed rows drawn = 2.5 epochs of 1,280"
    assert rows["validation"] == "none (data.validation is empty)"
    assert "validation.jsonl" not in rows["metrics"] and "TensorBoard" not in rows


@pytest.mark.parametrize("stage", STAGES)
def test_a_later_stage_that_starts_from_nothing_says_so(stage: str, backbone: Path, tmp_path: Path) -> None:
    config = tiny_config(backbone, tmp_path)
    config.training.stage = stage
    row = _header(config).get("starts from")
    if stage.startswith("stage1"):
        assert row is None
    else:
        assert row == (
            "nothing trained earlier: adapters and plugins are new (checkpoint.init_from names earlier stages)"
        )


@pytest.mark.parametrize("stage", STAGES)
def test_trained_parameters_of_a_stage(stage: str, backbone: Path, tmp_path: Path) -> None:
    config = tiny_config(backbone, tmp_path)
    every, trained = count_parameters(config.model), count_trained(config.model, STAGES[stage].trainable)
    for group, count in every.items():
        if group in ("embeddings", "head"):
            # 64 channels; the VQ tokens are <start_index>, <idx_*>, <end_index>, <pixel_newline>.
            rows = {"stage2": count, "stage1_generation": (NUM_CODES + 3) * 64, "stage1_joint": (NUM_CODES + 3) * 64}
            assert trained[group] == rows.get(stage, 0)
        else:
            assert trained[group] == (count if group in STAGES[stage].trainable else 0)
