"""A plan: every legal layout with memory, traffic and time, best first."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hgpt.batching import global_batch_size
from megatron_hgpt.planner import communication
from megatron_hgpt.planner.activations import ActivationModel
from megatron_hgpt.planner.hardware import GIB
from megatron_hgpt.planner.layouts import Layout, legal_layouts
from megatron_hgpt.planner.memory import RankMemory, rank_memory
from megatron_hgpt.planner.meta_model import RankModel, build_rank_models
from megatron_hgpt.planner.request import PlanRequest
from megatron_hgpt.planner.timing import StepTime, model_flops_per_step, step_time, task_weights


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """One layout with its memory, traffic and time."""

    layout: Layout
    num_micro_batches: int
    models: list[RankModel]
    memories: list[RankMemory]
    """Per pipeline rank."""
    traffic_bytes: dict[str, float]
    """What one rank sends per optimizer step, by purpose; for each purpose the largest over the pipeline ranks."""
    time: StepTime
    tokens_per_s: float
    """Over all GPUs, padding included."""
    mfu: float
    """Model FLOPs by the 4N rule over the peak of all GPUs in the time of a step, 0 … 1."""
    fits: bool

    @property
    def peak(self) -> RankMemory:
        """The fullest pipeline rank."""
        return max(self.memories, key=lambda memory: memory.total)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All layouts: those that fit first, then by time."""

    request: PlanRequest
    layouts: list[LayoutPlan]
    refused: dict[str, int]
    """Reason -> candidates that it refuses."""


def _traffic(
    request: PlanRequest, layout: Layout, models: list[RankModel], memories: list[RankMemory]
) -> dict[str, float]:
    count, totals = layout.num_micro_batches(request), {}
    weights = task_weights(request)
    sizes = {task: ActivationModel(request=request, layout=layout, task=task) for task in weights}
    for name, traffic in communication.PER_MICRO_BATCH.items():
        totals[name] = max(
            count * sum(weight * traffic(sizes[task], rank).bytes for task, weight in weights.items())
            for rank in range(layout.pipeline)
        )
    first = sizes[request.tasks[0]]
    totals["gradients"] = max(
        communication.gradient_traffic(first, model, memory.gradients).bytes
        + communication.replicated_gradient_traffic(first, model).bytes
        for model, memory in zip(models, memories, strict=True)
    )
    return totals


def plan_layout(request: PlanRequest, layout: Layout, models: list[RankModel]) -> LayoutPlan:
    """Memory, traffic and time of one layout whose ranks hold `models`."""
    memories = [rank_memory(request, layout, model) for model in models]
    time = step_time(request, layout, models, memories)
    tokens = global_batch_size(request.config) * request.sequence_length
    return LayoutPlan(
        layout=layout,
        num_micro_batches=layout.num_micro_batches(request),
        models=models,
        memories=memories,
        traffic_bytes=_traffic(request, layout, models, memories),
        time=time,
        tokens_per_s=tokens / time.total,
        mfu=model_flops_per_step(request) / (time.total * layout.world_size * request.peak_tflops * 1e12),
        fits=max(memory.total for memory in memories) <= request.cluster.gpu.memory_gib * GIB,
    )


def make_plan(request: PlanRequest) -> Plan:
    """Plan every legal layout; models are built once per (tensor, pipeline).

    Raises:
        ConfigError: no legal layout.
        HealthGPTError: the process has a process group already.
    """
    legal, refused = legal_layouts(request)
    models: dict[tuple[int, int], list[RankModel]] = {}
    plans = []
    for layout in legal:
        key = (layout.tensor, layout.pipeline)
        if key not in models:
            models[key] = build_rank_models(request, layout)
        plans.append(plan_layout(request, layout, models[key]))
    plans.sort(key=lambda plan: (not plan.fits, plan.time.total if plan.fits else plan.peak.total))
    return Plan(request=request, layouts=plans, refused=refused)
