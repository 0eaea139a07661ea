"""Memory of a rank: parameters and optimizer state exactly as Megatron lays them out, activations by formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hgpt.planner.activations import ActivationModel
from megatron_hgpt.planner.layouts import Layout
from megatron_hgpt.planner.meta_model import RankModel
from megatron_hgpt.planner.request import PlanRequest

_GRADIENT_BYTES = 4
"""The trainer's DDP reduces in fp32."""
_MOMENT_BYTES = 8
"""Adam's two moments, fp32."""
_ALIGN_PARAMETER, _ALIGN_BUFFER = 64, 128
"""Elements to which Megatron's distributed optimizer pads the start of a parameter, and the end of the buffer."""


@dataclass(frozen=True, kw_only=True)
class OptimizerBytes:
    """Bytes on one rank that exist for the trained parameters, beside the parameters themselves."""

    gradients: int
    """DDP's buffer."""
    state: int
    """fp32 master copy (bf16 training) and Adam's moments; of the largest shard under the distributed optimizer."""


def optimizer_bytes(
    trained_numels: Sequence[int], *, master_copy: bool, distributed: bool, data_parallel_size: int
) -> OptimizerBytes:
    """Gradient buffer and optimizer state.

    Args:
        trained_numels: elements per trained parameter, in module order.
        master_copy: the parameters are bf16, so the optimizer keeps an fp32 copy.
        distributed: optimizer state is sharded over the data-parallel ranks.
        data_parallel_size: data x context ranks.
    """
    per_element = _MOMENT_BYTES + (_GRADIENT_BYTES if master_copy else 0)
    if not distributed:
        total = sum(trained_numels)
        return OptimizerBytes(gradients=total * _GRADIENT_BYTES, state=total * per_element)
    ranges, end = [], 0
    for numel in reversed(trained_numels):
        start = -(-end // _ALIGN_PARAMETER) * _ALIGN_PARAMETER
        end = start + numel
        ranges.append((start, end))
    align = math.lcm(data_parallel_size, _ALIGN_BUFFER)
    padded = -(-end // align) * align
    shard = padded // data_parallel_size
    held = [0] * data_parallel_size
    for start, stop in ranges:
        for rank in range(start // shard, (stop - 1) // shard + 1):
            held[rank] += min(stop, (rank + 1) * shard) - max(start, rank * shard)
    return OptimizerBytes(gradients=padded * _GRADIENT_BYTES, state=max(held) * per_element)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on a rank of one pipeline stage."""

    pipeline_rank: int
    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    reserve: int

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.frozen
            + self.trained
            + self.gradients
            + self.optimizer
            + self.activations
            + self.working
            + self.reserve
        )


def frozen_bytes(request: PlanRequest, model: RankModel) -> int:
    """Frozen parameters as built; FP8 adds two copies of the base linears, as they are and transposed, 1 byte each.

    Transformer Engine makes them once per step and keeps the bf16 weights. GPUs that multiply FP8 in any layout
    (Blackwell) need one copy: there the figure is too large by a byte per weight.
    """
    copies = 2 * model.count("base_linears", trained=False) if request.precision == "fp8" else 0
    return model.bytes(trained=False) + copies


def rank_memory(request: PlanRequest, layout: Layout, model: RankModel) -> RankMemory:
    """Memory of the ranks of one pipeline stage, for the task that needs more."""
    rank = model.pipeline_rank
    states = optimizer_bytes(
        model.trained_numels,
        master_copy=request.precision != "fp32",
        distributed=request.distributed_optimizer,
        data_parallel_size=layout.data * layout.context,
    )
    tasks = [ActivationModel(request=request, layout=layout, task=task) for task in request.tasks]
    heaviest = max(tasks, key=lambda task: task.peak_bytes(rank) + task.working_bytes(rank))
    return RankMemory(
        pipeline_rank=rank,
        frozen=frozen_bytes(request, model),
        trained=model.bytes(trained=True),
        gradients=states.gradients,
        optimizer=states.state,
        activations=heaviest.peak_bytes(rank),
        working=heaviest.working_bytes(rank),
        reserve=int(request.assumptions.reserve_gib * 2**30),
    )
