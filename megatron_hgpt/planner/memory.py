"""Memory of a rank: parameters and optimizer state exactly as Megatron lays them out, activations by formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_hgpt.planner.activations import ActivationModel
from megatron_hgpt.planner.hardware import GIB
from megatron_hgpt.planner.layouts import Layout
from megatron_hgpt.planner.meta_model import RankModel
from megatron_hgpt.planner.request import FP32_BYTES, PlanRequest
from megatron_hgpt.planner.schedule import peak_activation_bytes, working_bytes
from megatron_hgpt.rounding import round_up

_MOMENT_BYTES = 2 * FP32_BYTES
"""Adam's two moments, fp32."""
_ALIGN_PARAMETER, _ALIGN_BUFFER = 64, 128
"""Elements to which Megatron's distributed optimizer pads the start of a parameter, and the end of the buffer."""


@dataclass(frozen=True, kw_only=True)
class OptimizerBytes:
    """Bytes on one rank that exist for the trained parameters, beside the parameters themselves."""

    gradients: int
    """Gradients in the buffer of Megatron's DDP."""
    state: int
    """fp32 master copy (bf16 training) and Adam's moments; of the largest shard under the distributed optimizer."""


def optimizer_bytes(
    trained_numels: Sequence[Sequence[int]],
    *,
    master_copy: bool,
    distributed: bool,
    data_parallel_size: int,
    offload: bool = False,
) -> OptimizerBytes:
    """Gradient buffer and optimizer state.

    Args:
        trained_numels: per model chunk, elements of each trained parameter in module order.
        master_copy: the parameters are bf16, so the optimizer keeps an fp32 copy.
        distributed: optimizer state is sharded over the data-parallel ranks.
        data_parallel_size: data x context ranks.
        offload: the moments live in host memory.
    """
    per_element = (0 if offload else _MOMENT_BYTES) + (FP32_BYTES if master_copy else 0)
    if not distributed:
        total = sum(map(sum, trained_numels))
        return OptimizerBytes(gradients=total * FP32_BYTES, state=total * per_element)
    buffers, held = 0, [0] * data_parallel_size
    for numels in trained_numels:
        size, shards = _sharded_buffer(numels, data_parallel_size)
        buffers += size
        held = [sum(pair) for pair in zip(held, shards, strict=True)]
    return OptimizerBytes(gradients=buffers * FP32_BYTES, state=max(held) * per_element)


def _sharded_buffer(numels: Sequence[int], data_parallel_size: int) -> tuple[int, list[int]]:
    """Elements of the gradient buffer of one model chunk, and of parameters in each rank's equal share of it."""
    ranges, end = [], 0
    for numel in reversed(numels):
        start = round_up(end, _ALIGN_PARAMETER)
        end = start + numel
        ranges.append((start, end))
    align = math.lcm(data_parallel_size, _ALIGN_BUFFER)
    padded = round_up(end, align)
    shard = padded // data_parallel_size
    held = [0] * data_parallel_size
    for start, stop in ranges:
        for rank in range(start // shard, (stop - 1) // shard + 1):
            held[rank] += min(stop, (rank + 1) * shard) - max(start, rank * shard)
    return padded, held


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
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "pipeline_rank")


def frozen_bytes(request: PlanRequest, model: RankModel) -> int:
    """Frozen parameters as built; fp8 keeps the base linears in FP8 too, as they are and transposed."""
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
        offload=request.config.optimizer.cpu_offload,
    )
    tasks = [ActivationModel(request=request, layout=layout, task=task) for task in request.tasks]
    activations, working = max(((peak_activation_bytes(s, rank), working_bytes(s, rank)) for s in tasks), key=sum)
    return RankMemory(
        pipeline_rank=rank,
        frozen=frozen_bytes(request, model),
        trained=model.bytes(trained=True),
        gradients=states.gradients,
        optimizer=states.state,
        activations=activations,
        working=working,
        reserve=int(request.assumptions.reserve_gib * GIB),
    )
