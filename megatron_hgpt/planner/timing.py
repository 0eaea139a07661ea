"""Time of one optimizer step: an estimate from peaks, bandwidths and stated assumptions, not a measurement.

Compute follows the 4N rule: 4 FLOPs per token and frozen parameter that gradients pass through, 6 per trained one, 2 in
the tower; full recomputation adds the forward 2. Attention is counted beside it: 2 s q forward per token (causal), 2.5
times that backward. Nothing is overlapped, so communication counts in full.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_hgpt.batching import global_batch_size
from megatron_hgpt.hooks.throughput import PathParameters
from megatron_hgpt.model.parameter_counts import count_hlora, count_parameters
from megatron_hgpt.parameters import ADAPTER_GROUPS
from megatron_hgpt.planner import communication
from megatron_hgpt.planner.activations import ActivationModel
from megatron_hgpt.planner.communication import Traffic
from megatron_hgpt.planner.layouts import Layout
from megatron_hgpt.planner.memory import RankMemory
from megatron_hgpt.planner.meta_model import RankModel
from megatron_hgpt.planner.request import PlanRequest
from megatron_hgpt.rounding import ceil_div
from megatron_hgpt.samples import Task


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step on the critical path; the parts add up."""

    compute: float
    memory_bound: float
    """Operators between the GEMMs, at HBM bandwidth."""
    tensor_comm: float
    hlora_comm: float
    context_comm: float
    vision_comm: float
    pipeline_comm: float
    pipeline_bubble: float
    """Waiting for the other stages at the start and the end of the step."""
    gradient_comm: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def bottleneck(self) -> str:
        """Name of the part that takes longest."""
        return max((field.name for field in fields(self)), key=lambda name: getattr(self, name))


def task_weights(request: PlanRequest) -> dict[Task, float]:
    """Share of the micro-batches per task: the configured mixture, else equal."""
    mixture = request.config.data.mixture
    weights = {task: float(mixture.get(task.value, 0.0)) if mixture else 1.0 for task in request.tasks}
    total = sum(weights.values())
    return {task: weight / total for task, weight in weights.items()} if total else dict.fromkeys(weights, 0.0)


def _seconds(request: PlanRequest, traffic: Traffic, span: int) -> float:
    assumed = request.assumptions
    wire = traffic.bytes / (request.cluster.bandwidth(span) * assumed.network_efficiency)
    return wire + traffic.num_messages * assumed.collective_latency_s


def _tower_blocks(request: PlanRequest, task: Task) -> float:
    """Share of the tower's blocks that a task runs."""
    vision = request.config.model.vision
    num_layers = vision.hf_config["num_hidden_layers"]
    index = getattr(vision, f"{task.value}_hidden_state")
    return (index if index >= 0 else num_layers + 1 + index) / num_layers


def _first_stage_flops(sizes: ActivationModel, counts: dict[str, int]) -> float:
    """Tower, forward only, its images split over tensor and context ranks; adapter on all images on every rank."""
    request = sizes.request
    num_images, positions = request.images_per_sample * sizes.micro_batch_size, sizes.num_image_positions
    adapter = next(name for name, task in ADAPTER_GROUPS.items() if task is sizes.task)
    work: float = (6 if sizes.trains_adapter else 2) * counts.get(adapter, 0) * positions
    if num_images and request.config.data.feature_cache is None:
        images_here = ceil_div(num_images, sizes.layout.tensor * sizes.layout.context)
        per_image = positions // num_images + 1
        work += 2 * counts["tower"] * _tower_blocks(request, sizes.task) * images_here * per_image
    return work


def _compute_seconds(sizes: ActivationModel, model: RankModel, counts: dict[str, int]) -> float:
    """One micro-batch, forward and backward, on one pipeline stage."""
    request, layout = sizes.request, sizes.layout
    shape, tokens = request.shape, sizes.num_tokens
    again = 2 if request.recompute == "full" else 0
    base = (4 + again) * model.count("base_linears") * tokens
    plugin = request.config.model.hlora.of(sizes.task)
    layers = layout.layers_per_stage[model.pipeline_rank]
    bf16 = 0.0
    if plugin is not None:
        share = layers / shape.num_layers / layout.tensor
        bf16 += ((6 if sizes.trains_plugin else 4) + again) * count_hlora(shape, plugin) * share * tokens
    keys = layout.padded_length(request) / 2
    if shape.sliding_window is not None:
        keys = min(keys, shape.sliding_window)
    forward = 4 * keys * shape.num_heads * shape.head_dim / layout.tensor * tokens * layers
    bf16 += forward * (3.5 if request.recompute == "none" else 4.5)
    if model.pipeline_rank == 0:
        bf16 += _first_stage_flops(sizes, counts)
    if model.pipeline_rank == layout.pipeline - 1:
        bf16 += (6 if sizes.trains_vocabulary else 4) * model.count("head") * sizes.num_supervised
    efficiency = request.assumptions.efficiency * 1e12
    # All but the frozen base linears stays in bf16 where those are FP8.
    return base / (request.peak_tflops * efficiency) + bf16 / (
        min(request.peak_tflops, request.cluster.gpu.bf16_tflops) * efficiency
    )


def _micro_batch_seconds(
    request: PlanRequest, layout: Layout, model: RankModel, counts: dict[str, int]
) -> dict[str, float]:
    """Parts of one micro-batch's time on one stage, averaged over the tasks."""
    rank, parts = model.pipeline_rank, dict[str, float]()
    hbm = request.cluster.gpu.hbm_gb_s * 1e9
    for task, weight in task_weights(request).items():
        sizes = ActivationModel(request=request, layout=layout, task=task)
        moved = sum(sizes.layer_bytes().values()) * layout.layers_per_stage[rank]
        seconds = {
            "compute": _compute_seconds(sizes, model, counts),
            "memory_bound": request.assumptions.elementwise_passes * moved / hbm,
        }
        for purpose, traffic in communication.PER_MICRO_BATCH.items():
            span = communication.span_of(purpose, layout)
            seconds[f"{purpose}_comm"] = _seconds(request, traffic(sizes, rank), span)
        for name, value in seconds.items():
            parts[name] = parts.get(name, 0.0) + weight * value
    return parts


def step_time(request: PlanRequest, layout: Layout, models: list[RankModel], memories: list[RankMemory]) -> StepTime:
    """Under 1F1B the slowest stage runs all its micro-batches and waits once for each other stage (one chunk of it)."""
    counts = count_parameters(request.config.model)
    stages = [_micro_batch_seconds(request, layout, model, counts) for model in models]
    totals = [sum(stage.values()) for stage in stages]
    slowest = totals.index(max(totals))
    count = layout.num_micro_batches(request)
    sizes = ActivationModel(request=request, layout=layout, task=request.tasks[0])
    hbm = request.cluster.gpu.hbm_gb_s * 1e9
    gradient, optimizer = 0.0, 0.0
    for model, memory in zip(models, memories, strict=True):
        reduced = communication.gradient_traffic(sizes, model, memory.gradients)
        summed = communication.replicated_gradient_traffic(sizes, model)
        span = communication.span_of("gradients", layout)
        gradient = max(gradient, _seconds(request, reduced, span) + _seconds(request, summed, layout.tensor))
        # Gradients: zeroed, read for the norm and for the update. State: read and written. Parameters: written.
        optimizer = max(optimizer, (3 * memory.gradients + 2 * memory.optimizer + memory.trained) / hbm)
    return StepTime(
        **{name: count * value for name, value in stages[slowest].items()},
        pipeline_bubble=(sum(totals) - totals[slowest]) / layout.virtual,
        gradient_comm=gradient,
        optimizer=optimizer,
    )


def model_flops_per_step(request: PlanRequest) -> float:
    """4N rule over the whole model, head at supervised positions only, without tower, attention and recomputation."""
    counts, shape = count_parameters(request.config.model), request.shape
    total = 0.0
    for task, weight in task_weights(request).items():
        sizes = ActivationModel(
            request=request,
            layout=Layout(tensor=1, pipeline=1, context=1, data=1, layers_per_stage=(shape.num_layers,)),
            task=task,
        )
        plugin = counts.get(f"hlora_{task.value}", 0)
        trained = plugin if sizes.trains_plugin else 0
        path = PathParameters(num_frozen=counts["backbone"] + plugin - trained, num_trained=trained)
        head = PathParameters(
            num_frozen=0 if sizes.trains_vocabulary else counts["head"],
            num_trained=counts["head"] if sizes.trains_vocabulary else 0,
        )
        per_sample = path.flops_per_token * request.sequence_length
        per_sample += head.flops_per_token * request.supervised_tokens[task]
        total += weight * per_sample
    return total * global_batch_size(request.config)
