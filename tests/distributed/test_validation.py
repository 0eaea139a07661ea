"""Validation on gloo: one loss at every layout, each held-out sample counted once, training as if without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hgpt.config import EngineConfig, HLoRAPluginConfig, ParallelConfig, TrainingConfig
from megatron_hgpt.data.collate import ExpandedSample
from megatron_hgpt.data.validation_loader import ValidationLoader
from megatron_hgpt.errors import SkipSample
from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState, ValidationRecord
from megatron_hgpt.samples import EncodedSample, Task
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import IMAGE_SIZE, make_micro_batch, tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer

NUM_STEPS = 4
NUM_SAMPLES = {Task.COMPREHENSION: 5, Task.GENERATION: 4}
"""With micro-batches of 2 they are 3 + 2: two ranks do not share them evenly."""

LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "TP2 + SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "none"),
    "PP2": (2, {"pipeline_model_parallel_size": 2}, "none"),
    "PP2 interleaved": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, "none"),
    "DP2, packed": (2, {}, "by_task"),
    "DP2 + distributed optimizer": (2, {"use_distributed_optimizer": True}, "none"),
    "CP2": (2, {"context_parallel_size": 2}, "none"),
    "DP2 x PP2": (4, {"pipeline_model_parallel_size": 2}, "none"),
}
"""Name -> processes, `parallel` section, `data.packing` of the training rows."""


class HeldOut:
    """Stands for `SampleSource`: rows of named micro-batches; one of them cannot be used."""

    image_size = IMAGE_SIZE
    unusable = 1

    def members(self, task: Task) -> np.ndarray:
        first = 0 if task is Task.COMPREHENSION else NUM_SAMPLES[Task.COMPREHENSION]
        return np.arange(first, first + NUM_SAMPLES[task])

    def load(self, index: int) -> tuple[EncodedSample, ExpandedSample]:
        if index == self.unusable:
            raise SkipSample("unreadable_image", "sample 1")
        task = Task.COMPREHENSION if index < NUM_SAMPLES[Task.COMPREHENSION] else Task.GENERATION
        batch = make_micro_batch(f"held out {index}", task, length=20 + index)
        row = index % 2  # the second row has more supervised tokens than the first
        expanded = ExpandedSample(
            sample_id=str(index),
            tokens=batch.tokens[row],
            labels=batch.labels[row],
            image_mask=batch.image_mask[row],
            pixel_values=[batch.pixel_values[row]],
            features=[],
            is_truncated=False,
        )
        stored = EncodedSample(
            sample_id=str(index), task=task, tokens=expanded.tokens, loss_mask=expanded.image_mask, images=[]
        )
        return stored, expanded


class Recorder(Hook):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validations: list[ValidationRecord] = []
        self.order: list[str] = []

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        self.losses += [record.loss, record.grad_norm]

    def on_validation_start(self, state: TrainState) -> None:
        self.order.append(f"start {state.step}")

    def on_validation(self, state: TrainState, record: ValidationRecord) -> None:
        assert record.step == state.step
        self.order.append(f"end {state.step}")
        self.validations.append(record)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbones") / "phi3", "phi3", num_layers=4)


def fit(
    backbone: Path,
    folder: Path,
    parallel: ParallelConfig,
    packing: str = "none",
    interval: int | None = 2,
    dropout: float = 0.0,
    engine: EngineConfig | None = None,
) -> tuple[list[float], list[ValidationRecord], list[str]]:
    """Losses and gradient norms of the steps, validation records, order of the hook's calls."""
    from megatron_hgpt import distributed
    from megatron_hgpt.backbone.implementation import sequence_multiple

    context = distributed.initialize(parallel, seed=1)
    training = TrainingConfig(
        stage="stage3_joint", num_steps=NUM_STEPS, precision="fp32", micro_batch_size=2, global_batch_size=8,
        validation_interval_steps=interval or 0,
    )  # fmt: skip
    config = tiny_config(backbone, folder, parallel=parallel, training=training, engine=engine or EngineConfig())
    for plugin in (config.model.hlora.comprehension, config.model.hlora.generation):
        assert isinstance(plugin, HLoRAPluginConfig)
        plugin.dropout = dropout
    recorder = Recorder()
    trainer = build_trainer(config, context, packing=packing, hooks=[recorder])
    if interval is not None:
        trainer.validation = ValidationLoader(
            HeldOut(),  # type: ignore[arg-type]
            tasks=trainer.stage.tasks,
            micro_batch_size=2,
            dp_rank=context.dp_rank,
            dp_size=context.dp_size,
            pad_to_multiple=sequence_multiple(parallel, training),
            multiple_of=parallel.pipeline_model_parallel_size,
        )
    trainer.fit()
    return recorder.losses, recorder.validations, recorder.order


@pytest.fixture(scope="module")
def one_process(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ValidationRecord]:
    _, validations, order = run_ranks(fit, 1, backbone, tmp_path_factory.mktemp("one"), ParallelConfig())[0]
    assert order == ["start 2", "end 2", "start 4", "end 4"]
    return validations


def check(validations: list[ValidationRecord], expected: list[ValidationRecord], relative: float) -> None:
    assert [record.step for record in validations] == [2, 4]
    for record, one in zip(validations, expected, strict=True):
        assert record.num_samples_per_task == {"comprehension": 4, "generation": 4}, "the unusable sample is left out"
        assert record.num_tokens == one.num_tokens
        assert record.loss_per_task == pytest.approx(one.loss_per_task, rel=relative)
        assert record.loss == pytest.approx(one.loss, rel=relative)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_loss_of_one_process(
    layout: str, backbone: Path, one_process: list[ValidationRecord], tmp_path: Path
) -> None:
    assert one_process[0].loss != pytest.approx(one_process[1].loss, rel=1e-3), "the weights moved in between"
    world_size, parallel, packing = LAYOUTS[layout]
    for _, validations, _ in run_ranks(fit, world_size, backbone, tmp_path, ParallelConfig(**parallel), packing):
        check(validations, one_process, 1e-5)


def test_the_mean_is_over_tokens_and_dropout_is_off(
    backbone: Path, one_process: list[ValidationRecord], tmp_path: Path
) -> None:
    per_task = one_process[0].loss_per_task
    weights = {task: sum(4 + 3 * (i % 2) for i in indices) for task, indices in
               {"comprehension": (0, 2, 3, 4), "generation": (5, 6, 7, 8)}.items()}  # fmt: skip
    assert one_process[0].num_tokens == sum(weights.values())
    mean = sum(per_task[task] * weights[task] for task in weights) / sum(weights.values())
    assert one_process[0].loss == pytest.approx(mean, rel=1e-12)
    twice = run_ranks(validate_twice, 1, backbone, tmp_path)[0]
    assert twice[0] == twice[1]


def validate_twice(backbone: Path, folder: Path) -> list[float]:
    """Under a dropout that no two forward passes could share."""
    from megatron_hgpt import distributed

    context = distributed.initialize(ParallelConfig(), seed=1)
    config = tiny_config(backbone, folder)
    for plugin in (config.model.hlora.comprehension, config.model.hlora.generation):
        assert isinstance(plugin, HLoRAPluginConfig)
        plugin.dropout = 0.5
    trainer = build_trainer(config, context)
    trainer.validation = ValidationLoader(HeldOut(), tasks=trainer.stage.tasks, micro_batch_size=2)  # type: ignore[arg-type]
    records = [trainer.validate() for _ in range(2)]
    return [record.loss for record in records if record is not None]


@pytest.mark.parametrize("layout", ["one process", "PP2", "TP2 + SP"])
def test_training_is_the_same_digits_with_and_without(layout: str, backbone: Path, tmp_path: Path) -> None:
    """With dropout: a random number that validation drew would show in the next step's loss.

    Under sequence parallelism dropout draws from Megatron's own random states and not from torch's.
    """
    world_size, parallel, _ = LAYOUTS.get(layout, (1, {}, "none"))
    curves = [
        run_ranks(fit, world_size, backbone, tmp_path / name, ParallelConfig(**parallel), "none", interval, 0.3)[0][0]
        for name, interval in (("with", 1), ("without", None))
    ]
    assert curves[0] == curves[1]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero_gives_the_loss_of_one_process(
    zero_stage: int, backbone: Path, one_process: list[ValidationRecord], tmp_path: Path
) -> None:
    """Two ranks with micro-batches of different tasks, and at stage 3 with sharded weights."""
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if zero_stage == 3 else {}
    engine = EngineConfig(name="deepspeed", zero_stage=zero_stage, overrides=overrides)
    for _, validations, _ in run_ranks(fit, 2, backbone, tmp_path, ParallelConfig(), "none", 2, 0.0, engine):
        check(validations, one_process, 1e-5)
