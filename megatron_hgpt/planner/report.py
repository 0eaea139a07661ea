"""A plan as a table, and as JSON."""

from __future__ import annotations

import dataclasses

from megatron_hgpt.batching import global_batch_size
from megatron_hgpt.files import Json
from megatron_hgpt.planner.hardware import GIB
from megatron_hgpt.planner.plan import LayoutPlan, Plan
from megatron_hgpt.planner.request import PlanRequest

_COLUMNS = ("TP", "PP", "CP", "DP", "micro", "fits", "GiB", "frozen", "train", "grad", "optim", "activ", "work",
            "step s", "tok/s", "MFU", "bottleneck")  # fmt: skip
_MILLISECONDS_BELOW_S = 0.1
"""A fastest step shorter than this has its time, and that of all others, in milliseconds."""


def _row(plan: LayoutPlan, *, in_ms: bool) -> list[str]:
    layout, peak, time = plan.layout, plan.peak, plan.time
    sizes = (peak.total, peak.frozen, peak.trained, peak.gradients, peak.optimizer, peak.activations, peak.working)
    share = getattr(time, time.bottleneck) / time.total
    pipeline = f"{layout.pipeline}x{layout.virtual}" if layout.virtual > 1 else str(layout.pipeline)
    return [
        *(str(layout.tensor), pipeline, str(layout.context), str(layout.data)),
        str(plan.num_micro_batches),
        "yes" if plan.fits else "no",
        *(f"{size / GIB:.1f}" for size in sizes),
        f"{time.total * (1000 if in_ms else 1):.2f}",
        f"{plan.tokens_per_s:,.0f}",
        f"{plan.mfu:.1%}",
        f"{time.bottleneck} {share:.0%}",
    ]


def header_lines(request: PlanRequest) -> list[str]:
    """What was asked and what is assumed."""
    cluster, assumed, training = request.cluster, request.assumptions, request.config.training
    gpu, shape = cluster.gpu, request.shape
    supervised = ", ".join(f"{task.value} {request.supervised_tokens[task]}" for task in request.tasks)
    return [
        f"model       {request.config.name}: {shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_heads} "
        f"heads, {shape.num_kv_heads} KV heads",
        f"training    {training.stage}, {request.precision}, recompute {request.recompute}, distributed optimizer "
        f"{'on' if request.distributed_optimizer else 'off'}, "
        f"{'local' if request.uses_local_layers else 'Transformer Engine'} layers",
        f"batch       {global_batch_size(request.config)} samples of {request.sequence_length} tokens, micro batch "
        f"{training.micro_batch_size}, {request.images_per_sample} image(s) per sample",
        f"head        runs at supervised positions only, per sample: {supervised}",
        f"cluster     {cluster.num_gpus} x {cluster.gpu_name} ({gpu.memory_gib:g} GiB, peak {request.peak_tflops:g} "
        f"TFLOP/s, HBM {gpu.hbm_gb_s:g} GB/s), {cluster.node_size} per node; {gpu.nvlink_gb_s:g} GB/s in a node, "
        f"{gpu.network_gb_s:g} GB/s between, per GPU and direction",
        f"assumed     {assumed.efficiency:.0%} of the peak in GEMMs, {assumed.network_efficiency:.0%} of the links, "
        f"{assumed.collective_latency_s * 1e6:g} us per message, {assumed.elementwise_passes:g} HBM passes per saved "
        f"byte, {assumed.reserve_gib:g} GiB reserve; no overlap",
        "rule        4N: 4 FLOPs per token and frozen parameter, 6 per trained one; MFU counts these alone",
    ]


def table(plan: Plan, *, top: int) -> str:
    """The plan as text: question, layouts (memory in GiB of the fullest rank), reasons of refusals."""
    shown = plan.layouts[:top]
    in_ms = min(layout.time.total for layout in shown) < _MILLISECONDS_BELOW_S
    head = ["step ms" if in_ms and name == "step s" else name for name in _COLUMNS]
    rows = [head, *(_row(layout, in_ms=in_ms) for layout in shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    last = len(_COLUMNS) - 1
    lines = [*header_lines(plan.request), ""]
    for row in rows:
        cells = (
            cell.ljust(w) if i >= last else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    num_fit = sum(layout.fits for layout in plan.layouts)
    lines += [
        "",
        f"{num_fit} of {len(plan.layouts)} legal layouts fit; the first {len(shown)} are shown",
    ]
    best = plan.layouts[0]
    if best.fits:
        overrides = " ".join(override_arguments(plan.request, best))
        lines.append(f"best        {overrides}")
    return "\n".join([*lines, *_refused_lines(plan)])


def _refused_lines(plan: Plan) -> list[str]:
    """Why layouts are missing: the reasons where the user fixed a size, for then it may be one of theirs."""
    request, most = plan.request, sorted(plan.refused.items(), key=lambda item: -item[1])
    if not most:
        return []
    if request.tensor is request.pipeline is request.context is None:
        return [f"illegal     {sum(plan.refused.values())} layouts are not legal; --json lists them with reasons"]
    lines = [f"illegal     {count:>4} x {reason}" for reason, count in most[:8]]
    return [*lines, f"illegal     and {len(most) - 8} other reasons; --json lists all"] if len(most) > 8 else lines


def override_arguments(request: PlanRequest, plan: LayoutPlan) -> list[str]:
    """The layout, and what the user asked beside it, as ``key=value`` arguments of a training run."""
    parallel = plan.layout.parallel_config(distributed_optimizer=request.distributed_optimizer)
    arguments = [
        f"parallel.{field.name}={str(value).lower()}"
        for field in dataclasses.fields(parallel)
        if (value := getattr(parallel, field.name)) != getattr(type(parallel)(), field.name)
    ]
    return [*arguments, *request.asked]


def as_json(plan: Plan) -> Json:
    """Everything the table shows and more; sizes in bytes, times in seconds."""
    request = plan.request
    return {
        "question": header_lines(request),
        "model": request.config.name,
        "stage": request.config.training.stage,
        "precision": request.precision,
        "recompute": request.recompute,
        "distributed_optimizer": request.distributed_optimizer,
        "sequence_length": request.sequence_length,
        "micro_batch_size": request.config.training.micro_batch_size,
        "global_batch_size": global_batch_size(request.config),
        "cluster": dataclasses.asdict(request.cluster),
        "assumptions": dataclasses.asdict(request.assumptions),
        "layouts": [_layout_json(layout) for layout in plan.layouts],
        "refused": plan.refused,
    }


def _layout_json(plan: LayoutPlan) -> Json:
    ranks = [
        {
            **dataclasses.asdict(memory),
            "total": memory.total,
            "parameters": [dataclasses.asdict(g) for g in model.groups],
        }
        for memory, model in zip(plan.memories, plan.models, strict=True)
    ]
    return {
        **dataclasses.asdict(plan.layout),
        "fits": plan.fits,
        "memory_bytes": plan.peak.total,
        "num_micro_batches": plan.num_micro_batches,
        "step_s": plan.time.total,
        "time_s": dataclasses.asdict(plan.time),
        "bottleneck": plan.time.bottleneck,
        "tokens_per_s": plan.tokens_per_s,
        "mfu": plan.mfu,
        "sent_bytes_per_step": plan.traffic_bytes,
        "pipeline_ranks": ranks,
    }
