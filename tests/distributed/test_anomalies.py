"""Steps whose loss or gradient is not finite, and losses that jump, on real processes: stop, skip, rollback."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import shutil
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


class Learnt(FixedLoader):
    """The same samples in every step, which the model learns by heart, but other ones in the steps of `bad_steps`."""

    bad_steps: tuple[int, ...] = ()

    def next_step(self) -> list[MicroBatch]:
        step = self.step
        self.step = 0 if step not in self.bad_steps else 1 + step
        batches = super().next_step()
        self.step = step + 1
        return batches


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
    trainer_log = logging.getLogger("megatron_hgpt.trainer")
    trainer_log.addHandler(handler)
    trainer_log.setLevel(logging.INFO)
    logging.getLogger("megatron_hgpt.checkpoint.choice").addHandler(handler)
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
    config.optimizer.schedule = "linear"  # so that a schedule which is not set back shows
    loader = type("Loader", (options.get("loader", Poisoned),), {"bad_steps": bad_steps})
    trainer = build_trainer(config, context, loader_class=loader, hooks=[MetricsHook()])
    if "gradient" in options:
        overflow(trainer, *options["gradient"])
    weights: list[float] = []
    take_step = trainer.train_step

    def train_step() -> Any:
        if "loader_at" in options and trainer.step == options["loader_at"][0]:
            trainer.loader.load_state_dict({"step": options["loader_at"][1]})
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
    # A pipeline stage's own optimizer counts the groups that it holds; after a restore the others as well.
    return {"lines": lines, "error": error, "weights": weights, "final": final, "adam": max(steps)}


def checksum(trainer: Any) -> float:
    trained = [p for model in trainer.models for p in model.parameters() if p.requires_grad]
    return float(sum(p.detach().double().abs().sum() for p in trained))


def overflow(trainer: Any, step: int, rank: int) -> None:
    """The gradients become infinite on one rank, in one step; the loss stays as it is."""

    def infinite(gradient: torch.Tensor) -> torch.Tensor:
        is_due = trainer.step == step and trainer.context.rank == rank
        return torch.full_like(gradient, math.inf) if is_due else gradient

    for parameter in (p for model in trainer.models for p in model.parameters() if p.requires_grad):
        parameter.register_hook(infinite)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbones") / "phi3")


STEP_3 = "samples step 2 micro-batch 3/0, step 2 micro-batch 3/1"
PLACE = f"step 3: the loss is not finite on rank 1, micro-batch 2 of 2 ({STEP_3})"


def test_a_loss_that_is_not_finite_costs_one_update(backbone: Path, tmp_path: Path) -> None:
    results = run_ranks(fit, 2, backbone, tmp_path, (2,), AnomalyConfig(), {})
    for result in results:
        assert result["lines"] == [f"{PLACE}: its update is left out"]
        assert result["weights"][2] == result["weights"][1] and math.isfinite(result["final"])
        assert result["adam"] == NUM_STEPS - 1, "moments and step count are left alone as well"
    assert results[0]["final"] == results[1]["final"]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [(r["step"], r["anomaly"], r["action"], r["loss"]) for r in records if "anomaly" in r] == [
        (3, "not_finite", "skip", None)
    ]
    (line,) = (tmp_path / "anomalies.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == PLACE.removeprefix("step 3: ")
    assert json.loads((tmp_path / "summary.json").read_text())["anomalies"] == {"skip": 1}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2 + distributed optimizer": (2, {"parallel": ParallelConfig(use_distributed_optimizer=True)}),
    "PP2": (2, {"parallel": ParallelConfig(pipeline_model_parallel_size=2)}),
    "TP2 + SP": (2, {"parallel": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_is_found_before_it_is_added_up(
    layout: str, backbone: Path, tmp_path: Path
) -> None:
    world_size, options = LAYOUTS[layout]
    for result in run_ranks(fit, world_size, backbone, tmp_path, (), AnomalyConfig(), {**options, "gradient": (2, 1)}):
        (line,) = result["lines"]
        assert line.startswith("step 3: every loss is finite, but not the gradient of rank 1; its micro-batches hold ")
        assert line.endswith(": its update is left out") and "samples step 2 micro-batch" in line
        assert result["weights"][2] == result["weights"][1] and math.isfinite(result["final"])


@pytest.mark.parametrize("layout", ["DP2", *LAYOUTS])
def test_a_rollback_is_a_run_that_never_saw_the_samples(layout: str, backbone: Path, tmp_path: Path) -> None:
    """Step 4 is bad, step 2 was saved: steps 3 and 4 run again, on the samples that steps 5 and 6 would have had."""
    world_size, options = LAYOUTS.get(layout, (2, {}))
    policy = AnomalyConfig(not_finite="rollback")
    rolled = run_ranks(fit, world_size, backbone, tmp_path / "a", (3,), policy, options)
    without = {**options, "loader_at": (2, 4)}
    expected = run_ranks(fit, world_size, backbone, tmp_path / "b", (), policy, without)
    for result, reference in zip(rolled, expected, strict=True):
        (line,) = result["lines"]
        assert line.endswith("): back to step 2, and on with the samples behind step 4")
        assert (result["final"], result["adam"]) == (reference["final"], reference["adam"])
    lines = [read_metrics(tmp_path / folder / "metrics.jsonl") for folder in "ab"]
    assert [r["step"] for r in lines[0]] == [1, 2, 3, 4, 5, 6]
    assert [[r["loss"] for r in records] for records in lines][0] == [r["loss"] for r in lines[1]]
    assert [r["lr"] for r in lines[0]] == [r["lr"] for r in lines[1]]
    assert [r.get("rolled_back_from") for r in lines[0]] == [None, None, 4, None, None, None]
    (seen,) = map(json.loads, (tmp_path / "a" / "anomalies.jsonl").read_text().splitlines())
    assert (seen["step"], seen["back_to_step"], seen["action"]) == (4, 2, "rollback")


@pytest.mark.parametrize(
    ("policy", "message", "last"),
    [
        (AnomalyConfig(not_finite="stop"), "anomaly.not_finite=stop ends the run: look at these samples", 2),
        (AnomalyConfig(max_skips=2), "The updates of 2 steps in a row were left out already (anomaly.max_skips)", 4),
        (
            AnomalyConfig(not_finite="rollback", max_rollbacks=1),
            "The run went back 1 times already (anomaly.max_rollbacks)",
            2,
        ),
    ],
    ids=["stop", "skips", "rollbacks"],
)
def test_a_policy_or_a_limit_ends_the_run(
    policy: AnomalyConfig, message: str, last: int, backbone: Path, tmp_path: Path
) -> None:
    for result in run_ranks(fit, 2, backbone, tmp_path, (2, 3, 4, 5), policy, {"save_interval": 1}):
        assert message in result["error"] and "micro-batch 2 of 2 (samples step " in result["error"]
        assert math.isfinite(result["final"])
    folders = sorted((tmp_path / "checkpoints").glob("step_*"))
    healthy = {int(f.name[5:]): json.loads((f / "healthgpt.json").read_text())["is_healthy"] for f in folders}
    assert max(healthy) == last and all(healthy.values()), "an update that is left out moves no weight"


def test_a_run_goes_on_from_a_checkpoint_whose_last_update_was_left_out(backbone: Path, tmp_path: Path) -> None:
    (first,) = run_ranks(fit, 1, backbone, tmp_path, (3,), AnomalyConfig(), {"training": {"num_steps": 4}})
    assert first["lines"][0].endswith("its update is left out")
    (second,) = run_ranks(fit, 1, backbone, tmp_path, (), AnomalyConfig(), {})
    assert second["lines"][0].startswith(f"resumed from {tmp_path / 'checkpoints' / 'step_00000004'}: 4 of 6 steps")


def test_a_checkpoint_right_after_a_spike_gives_way(backbone: Path, tmp_path: Path) -> None:
    """That of step 21; a folder with such alone is not begun anew."""
    options = {"loader": Learnt, "save_interval": 20, "training": {"num_steps": 21}}
    anomaly = AnomalyConfig(spike_factor=1.5)
    run_ranks(fit, 1, backbone, tmp_path, (20,), anomaly, options)
    folder = tmp_path / "checkpoints"
    later = {**options, "training": {"num_steps": 22}}
    shutil.copytree(folder / "step_00000021", tmp_path / "only" / "checkpoints" / "step_00000021")
    (second,) = run_ranks(fit, 1, backbone, tmp_path, (), anomaly, later)
    said = f"{folder / 'step_00000021'} was saved right after a loss spike: {folder / 'step_00000020'} is used instead"
    assert said in second["lines"]
    assert any(line.startswith(f"resumed from {folder / 'step_00000020'}: 20 of 22") for line in second["lines"])
    (third,) = run_ranks(fit, 1, backbone, tmp_path / "only", (), anomaly, later)
    assert "step_00000021: 21 of 22 steps are done" in third["lines"][0]


def test_without_a_checkpoint_a_rollback_leaves_the_update_out(backbone: Path, tmp_path: Path) -> None:
    policy = AnomalyConfig(not_finite="rollback")
    (result,) = run_ranks(fit, 1, backbone, tmp_path, (0,), policy, {})
    (line,) = result["lines"]
    assert line.endswith("; there is no healthy checkpoint yet to go back to: its update is left out")
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("policy", ["warn", "rollback", "stop"])
def test_a_loss_spike(policy: str, backbone: Path, tmp_path: Path) -> None:
    options = {"loader": Learnt, "save_interval": 10, "training": {"num_steps": 22}}
    anomaly = AnomalyConfig(spike=policy, spike_factor=1.5)  # type: ignore[arg-type]
    (result,) = run_ranks(fit, 1, backbone, tmp_path, (20,), anomaly, options)
    seen = result["error"] if policy == "stop" else result["lines"][0]
    assert seen.startswith("step 21: the loss of ") and "the median of its last 20 steps " in seen
    assert "; highest on rank 0, micro-batch " in seen and "(samples step 21 micro-batch " in seen
    records = read_metrics(tmp_path / "metrics.jsonl")
    if policy == "warn":
        assert [r["anomaly"] for r in records if r["step"] == 21] == ["spike"]
        assert result["weights"][20] != result["weights"][19], "the update was made"
    elif policy == "rollback":
        assert [r["step"] for r in records] == list(range(1, 23)) and len(result["weights"]) == 23
        assert "back to step 20" in seen
    else:
        assert "anomaly.spike=stop ends the run" in seen and result["final"] == result["weights"][19]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("place", ["none", "cpu"])
def test_deepspeed_skips_and_goes_back_alike(place: Any, zero_stage: Any, backbone: Path, tmp_path: Path) -> None:
    """Also: the gradient of a step that was left out is not in the next one."""
    engine = {"engine": EngineConfig(name="deepspeed", zero_stage=zero_stage, offload_optimizer=place)}
    for result in run_ranks(fit, 2, backbone, tmp_path / "skip", (2,), AnomalyConfig(), engine):
        assert result["lines"] == [f"{PLACE}: its update is left out"]
        assert result["weights"][2] == result["weights"][1] and math.isfinite(result["final"])
    policy = AnomalyConfig(not_finite="rollback")
    rolled = run_ranks(fit, 2, backbone, tmp_path / "a", (3,), policy, engine)
    expected = run_ranks(fit, 2, backbone, tmp_path / "b", (), policy, {**engine, "loader_at": (2, 4)})
    assert [result["final"] for result in rolled] == [result["final"] for result in expected]
