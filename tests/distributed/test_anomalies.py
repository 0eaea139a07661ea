"""Steps whose loss or gradient is not finite, and losses that jump, on real processes: stop, skip, rollback."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hgpt.config import AnomalyConfig, CheckpointConfig, EngineConfig, ParallelConfig, TrainingConfig
from megatron_hgpt.errors import DivergedError
from megatron_hgpt.hooks.metrics import MetricsHook, read_metrics
from megatron_hgpt.samples import MicroBatch
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import FixedLoader, tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer

NUM_STEPS = 6


class Poisoned(FixedLoader):
    """The second micro-batch of one data-parallel rank has a picture of NaN in some steps (counted from 0)."""

    bad_steps: tuple[int, ...] = ()
    bad_rank = 1

    def next_step(self) -> list[MicroBatch]:
        batches = super().next_step()
        if self.step - 1 in self.bad_steps and self.dp_rank == min(self.bad_rank, self.dp_size - 1):
            pictures = torch.full_like(batches[1].pixel_values, math.nan)
            batches[1] = dataclasses.replace(batches[1], pixel_values=pictures)
        return batches


class PoisonedGradient(Poisoned):
    """Stands for a gradient that overflows where the loss does not; `fit` hangs a hook on a parameter."""


def fit(
    backbone: Path,
    folder: Path,
    bad_steps: tuple[int, ...],
    anomaly: AnomalyConfig,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What a run of NUM_STEPS steps shows, does and leaves."""
    from megatron_hgpt import distributed

    parallel = options.get("parallel", ParallelConfig())
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_hgpt.trainer").addHandler(handler)
    context = distributed.initialize(parallel, seed=1)
    settings = {"num_steps": NUM_STEPS, "precision": "fp32", "micro_batch_size": 2, "global_batch_size": 8}
    config = tiny_config(
        backbone,
        folder,
        parallel=parallel,
        anomaly=anomaly,
        training=TrainingConfig(**{**settings, **options.get("training", {})}),
        checkpoint=CheckpointConfig(save_interval_steps=options.get("save_interval", 2), keep_last=2),
        engine=options.get("engine", EngineConfig()),
    )
    loader = type("Loader", (Poisoned,), {"bad_steps": bad_steps})
    trainer = build_trainer(config, context, loader_class=loader, hooks=[MetricsHook()])
    if "gradient" in options:
        overflow(trainer, *options["gradient"])
    weights: list[float] = []
    take_step = trainer.train_step

    def train_step() -> Any:
        if "loader_at" in options and trainer.step == options["loader_at"][0]:
            trainer.loader.load_state_dict({"step": options["loader_at"][1]})
        if "loss" in options:
            options_loss(trainer, options["loss"])
        record = take_step()
        with trainer.engine.whole_parameters():
            weights.append(checksum(trainer))
        return record

    trainer.train_step = train_step  # type: ignore[method-assign]
    error = ""
    try:
        trainer.fit()
    except DivergedError as diverged:
        error = str(diverged)
    with trainer.engine.whole_parameters():
        final = checksum(trainer)
    steps = [int(group["step"]) for group in trainer.engine.optimizer_state().groups if "step" in group]
    return {"lines": lines, "error": error, "weights": weights, "final": final, "adam": steps}


def checksum(trainer: Any) -> float:
    trained = [p for model in trainer.models for p in model.parameters() if p.requires_grad]
    return float(sum(p.detach().double().abs().sum() for p in trained))


def overflow(trainer: Any, step: int, rank: int) -> None:
    """The gradient of one parameter becomes infinite on one rank, in one step; the loss stays as it is."""
    parameter = next(p for model in trainer.models for n, p in model.named_parameters() if p.requires_grad)

    def infinite(gradient: torch.Tensor) -> torch.Tensor:
        is_due = trainer.step == step and trainer.context.rank == rank
        return torch.full_like(gradient, math.inf) if is_due else gradient

    parameter.register_hook(infinite)


def options_loss(trainer: Any, change: dict[int, float]) -> None:
    """Make the loss of some steps another one, by the labels' scale: the forward step's sum is multiplied."""
    trainer.models[0].loss_factor = change.get(trainer.step, 1.0)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbones") / "phi3")


PLACE = "step 3: the loss is not finite on rank 1, micro-batch 2 of 2 (samples step 2 micro-batch 3/0, step 2 micro-batch 3/1)"


def test_a_loss_that_is_not_finite_costs_one_update(backbone: Path, tmp_path: Path) -> None:
    results = run_ranks(fit, 2, backbone, tmp_path, (2,), AnomalyConfig(), {})
    for result in results:
        assert result["lines"] == [f"{PLACE}: its update is left out"]
        assert result["weights"][2] == result["weights"][1] and math.isfinite(result["final"])
        assert max(result["adam"]) == NUM_STEPS - 1, "moments and step count are left alone as well"
    assert results[0]["final"] == results[1]["final"]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [(r["step"], r["anomaly"], r["action"], r["loss"]) for r in records if "anomaly" in r] == [
        (3, "not_finite", "skip", None)
    ]
    (line,) = (tmp_path / "anomalies.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == PLACE.removeprefix("step 3: ")
    assert json.loads((tmp_path / "summary.json").read_text())["anomalies"] == {"skip": 1}
