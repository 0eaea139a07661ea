"""Memory: formulas against small models that run here, and the properties that a plan relies on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.config import TrainingConfig
from megatron_hgpt.planner.activations import ActivationModel
from megatron_hgpt.planner.layouts import Layout
from megatron_hgpt.planner.measure import Comparison, compare_in_group, small_request
from megatron_hgpt.planner.memory import optimizer_bytes
from megatron_hgpt.planner.request import PlanRequest
from megatron_hgpt.planner.schedule import in_flight, peak_activation_bytes
from megatron_hgpt.samples import Task
from megatron_hgpt.testing.models import tiny_config, write_backbone

# Left out on purpose: masks and indices (bytes or 8 bytes per token). At 64 features they weigh more than at 5120.
TOLERANCE = 0.01
ONE = Layout(tensor=1, pipeline=1, context=1, data=1, layers_per_stage=(2,))


def tiny_request(
    folder: Path,
    *,
    stage: str = "stage3_joint",
    family: str = "phi3",
    micro: int = 2,
    dropout: float = 0.0,
    **changes: Any,
) -> PlanRequest:
    training = TrainingConfig(stage=stage, num_steps=1, micro_batch_size=micro, global_batch_size=micro)
    config = tiny_config(write_backbone(folder / "backbone", family), folder / "run", training=training)
    for plugin in (config.model.hlora.comprehension, config.model.hlora.generation):
        assert plugin is not None
        plugin.dropout = dropout
    return small_request(config, **changes)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"micro": 1, "dropout": 0.1},
        {"family": "llama", "dropout": 0.1},
        {"recompute": "selective"},
        {"micro": 1, "recompute": "selective"},
        {"recompute": "full"},
        {"stage": "stage1_comprehension"},
        {"stage": "stage1_generation", "recompute": "selective"},
        {"stage": "stage2"},
        {"images_per_sample": 0, "stage": "stage2"},
    ],
    ids=str,
)
def test_predictions_hold_against_a_running_model(case: dict[str, Any], tmp_path: Path) -> None:
    (rows,) = compare_in_group([(tiny_request(tmp_path, **case), ONE)])
    for row in rows:
        check(row)


def check(row: Comparison) -> None:
    if row.name.startswith("activations"):
        assert abs(row.deviation) < TOLERANCE, row
    else:
        assert row.predicted == row.measured, row


@pytest.mark.parametrize("distributed", [False, True])
def test_a_bf16_model_has_an_fp32_master_copy(distributed: bool, tmp_path: Path) -> None:
    request = tiny_request(tmp_path, precision="bf16", distributed_optimizer=distributed)
    (rows,) = compare_in_group([(request, ONE)])
    exact = {row.name: row for row in rows if not row.name.startswith("activations")}
    assert exact["optimizer state"].measured == 6 * exact["trained parameters"].measured  # 12 bytes beside 2
    for row in exact.values():
        check(row)


def test_sharded_optimizer_state_adds_up() -> None:
    numels = [100, 64, 1, 4096]
    whole = optimizer_bytes([numels], master_copy=True, distributed=False, data_parallel_size=8)
    assert (whole.gradients, whole.state) == (4 * 4261, 12 * 4261)
    alone = optimizer_bytes([numels], master_copy=True, distributed=True, data_parallel_size=1)
    assert alone.state == whole.state
    # In reverse: 4096, 1, 64 (from 4160), 100 (from 4224) end at 4324, padded to a multiple of lcm(8, 128) = 4352.
    sharded = optimizer_bytes([numels], master_copy=True, distributed=True, data_parallel_size=8)
    assert sharded.gradients == 4 * 4352
    assert sharded.state == 12 * 544
    assert optimizer_bytes([], master_copy=True, distributed=True, data_parallel_size=8).state == 0


def sizes(request: PlanRequest, **changes: Any) -> ActivationModel:
    layout = Layout(**{"tensor": 1, "pipeline": 1, "context": 1, "data": 1, "layers_per_stage": (2,), **changes})
    return ActivationModel(request=request, layout=layout, task=Task.GENERATION)


def test_activations_shrink_with_tensor_and_context_and_recomputation(tmp_path: Path) -> None:
    request = tiny_request(tmp_path)
    whole = sizes(request).kept_layer_bytes()
    assert whole / 2 < sizes(request, tensor=2).kept_layer_bytes() < whole * 0.7  # u and the rotary table stay whole
    assert sizes(request, context=2).kept_layer_bytes() > whole / 2  # keys and values stay whole
    request.config.model.transformer_impl = "auto"  # Transformer Engine's ring
    assert sizes(request, context=2).kept_layer_bytes() == pytest.approx(whole / 2, rel=0.05)
    full = dataclasses.replace(request, recompute="full")
    assert sizes(full).kept_layer_bytes() == 64 * 2 * 64 * 4  # tokens x micro batch x hidden x fp32
    selective = dataclasses.replace(request, recompute="selective")
    assert sizes(full).kept_layer_bytes() < sizes(selective).kept_layer_bytes() < whole


def test_1f1b_keeps_as_many_micro_batches_as_stages_follow(tmp_path: Path) -> None:
    request = tiny_request(tmp_path)
    request.config.training.global_batch_size = 6  # three micro-batches
    layers = {"pipeline": 4, "layers_per_stage": (1, 1, 1, 1)}
    assert [in_flight(sizes(request, **layers), rank) for rank in range(4)] == [[3], [3], [2], [1]]
    first, last = (peak_activation_bytes(sizes(request, **layers), rank) for rank in (0, 2))
    assert first > last


def test_the_interleaved_schedule_keeps_more_of_smaller_chunks(tmp_path: Path) -> None:
    request = tiny_request(tmp_path)
    request.config.training.global_batch_size = 16  # eight micro-batches
    layers = {"pipeline": 2, "layers_per_stage": (2, 2), "virtual": 2}
    # Megatron warms up with (following stages) * 2 + (chunks - 1) * stages, and starts one more.
    assert [in_flight(sizes(request, **layers), rank) for rank in range(2)] == [[3, 2], [2, 1]]
    plain = {"pipeline": 2, "layers_per_stage": (2, 2)}
    assert peak_activation_bytes(sizes(request, **layers), 0) > peak_activation_bytes(sizes(request, **plain), 0)
