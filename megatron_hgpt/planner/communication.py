"""Bytes that one rank sends, by ring algorithms: T ranks of an all-gather of V bytes send (T - 1) / T V each.

Per layer and micro-batch the sequence-parallel base gathers in front of QKV and FC1 and reduce-scatters behind the
projection and FC2: four [N, h] each way (frozen weights need no second gather in backward). H-LoRA adds, each way, u
of rank r on the two column-parallel linears and z of r + k on the two row-parallel ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_hgpt.planner.activations import ActivationModel
from megatron_hgpt.planner.layouts import Layout
from megatron_hgpt.planner.meta_model import RankModel
from megatron_hgpt.planner.request import FP32_BYTES


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank sends for one purpose."""

    bytes: float = 0.0
    num_messages: int = 0
    """Collectives or sends started."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(bytes=self.bytes + other.bytes, num_messages=self.num_messages + other.num_messages)

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(bytes=self.bytes * factor, num_messages=round(self.num_messages * factor))


def tensor_traffic(sizes: ActivationModel, pipeline_rank: int) -> Traffic:
    """Base model's collectives over tensor ranks for one micro-batch on one pipeline stage."""
    request, layout = sizes.request, sizes.layout
    if layout.tensor == 1:
        return Traffic()
    share, e = (layout.tensor - 1) / layout.tensor, request.element_bytes
    whole = sizes.num_tokens * request.shape.hidden_size * e * share
    passes = 3 if request.recompute == "full" else 2
    per_layer = Traffic(bytes=4 * passes * whole, num_messages=4 * passes)
    total = per_layer * layout.layers_per_stage[pipeline_rank]
    if pipeline_rank == 0:
        # Embedding: all-reduce forward, all-gather backward.
        total += Traffic(bytes=3 * whole, num_messages=2)
    if pipeline_rank == layout.pipeline - 1:
        # Gather in front of the head, all-reduce of its input gradient, three all-reduces of the loss.
        count = sizes.num_supervised
        loss = 2 * share * count * (request.shape.hidden_size * e + 3 * FP32_BYTES)
        total += Traffic(bytes=whole + loss, num_messages=5)
    return total


def hlora_traffic(sizes: ActivationModel, pipeline_rank: int) -> Traffic:
    """H-LoRA's small collectives over tensor ranks for one micro-batch on one pipeline stage."""
    from megatron_hgpt.hlora.layer_spec import linear_layouts

    request, layout = sizes.request, sizes.layout
    plugin = request.config.model.hlora.of(sizes.task)
    if layout.tensor == 1 or plugin is None:
        return Traffic()
    columns = 0
    for name, branch in linear_layouts(request.shape).items():
        is_column = name in ("linear_qkv", "linear_fc1")
        columns += branch.num_sections * (plugin.lora_rank + (0 if is_column else plugin.num_experts))
    share = (layout.tensor - 1) / layout.tensor
    passes = 3 if request.recompute == "full" else 2
    volume = passes * columns * sizes.num_tokens * request.element_bytes * share
    return Traffic(bytes=volume, num_messages=4 * passes) * layout.layers_per_stage[pipeline_rank]


def context_traffic(sizes: ActivationModel, pipeline_rank: int) -> Traffic:
    """Keys and values between context ranks for one micro-batch on one stage.

    The local layers gather them and reduce-scatter their gradients. Transformer Engine passes them round the ring, in
    backward once more and with their gradients.
    """
    request, layout = sizes.request, sizes.layout
    if layout.context == 1:
        return Traffic()
    shape, hops = request.shape, layout.context - 1
    block = 2 * sizes.num_tokens * shape.num_kv_heads * shape.head_dim // layout.tensor * request.element_bytes
    passes = (2 if request.uses_local_layers else 3) + (request.recompute != "none")
    num_messages = passes * (1 if request.uses_local_layers else hops)
    return Traffic(bytes=passes * hops * block, num_messages=num_messages) * layout.layers_per_stage[pipeline_rank]


def vision_traffic(sizes: ActivationModel, pipeline_rank: int) -> Traffic:
    """Tower features of the other tensor and context ranks' images for one micro-batch, on the first stage."""
    request, size = sizes.request, sizes.layout.tensor * sizes.layout.context
    if size == 1 or pipeline_rank or not sizes.num_image_positions or request.config.data.feature_cache is not None:
        return Traffic()
    width = request.config.model.vision.hf_config["hidden_size"]
    return Traffic(bytes=sizes.num_image_positions * width * request.element_bytes * (size - 1) / size, num_messages=1)


def pipeline_traffic(sizes: ActivationModel, pipeline_rank: int) -> Traffic:
    """Hidden states to the next chunk and their gradient to the previous one, [s / T, b, h], for one micro-batch."""
    layout = sizes.layout
    if layout.pipeline == 1:
        return Traffic()
    num_sends = 2 * layout.virtual - (pipeline_rank == layout.pipeline - 1) - (pipeline_rank == 0)
    size = sizes.num_local_tokens * sizes.request.shape.hidden_size * sizes.request.element_bytes
    return Traffic(bytes=num_sends * size, num_messages=num_sends)


PER_MICRO_BATCH: Mapping[str, Callable[[ActivationModel, int], Traffic]] = {
    "tensor": tensor_traffic,
    "hlora": hlora_traffic,
    "context": context_traffic,
    "vision": vision_traffic,
    "pipeline": pipeline_traffic,
}
"""Purpose -> what a rank of a pipeline stage sends for one micro-batch."""


def span_of(purpose: str, layout: Layout) -> int:
    """Neighbouring ranks among which the group of a purpose lies; Megatron numbers tensor, context, data, pipeline."""
    tensor, context = layout.tensor, layout.tensor * layout.context
    sizes = {"tensor": tensor, "hlora": tensor, "context": context, "vision": context}
    sizes["gradients"] = context * layout.data
    return sizes.get(purpose, layout.world_size)


def gradient_traffic(sizes: ActivationModel, model: RankModel, gradient_bytes: int) -> Traffic:
    """Once per step: gradients (fp32) over data x context ranks, and parameters back under the distributed optimizer.

    Without it an all-reduce; with it a reduce-scatter of gradients and an all-gather of parameters.
    """
    layout = sizes.layout
    size = layout.data * layout.context
    if size == 1 or not model.trained_numels:
        return Traffic()
    share = (size - 1) / size
    if sizes.request.distributed_optimizer:
        return Traffic(bytes=share * (gradient_bytes + model.bytes(trained=True)), num_messages=2)
    return Traffic(bytes=2 * share * gradient_bytes, num_messages=1)


def replicated_gradient_traffic(sizes: ActivationModel, model: RankModel) -> Traffic:
    """Once per step: gradients of the factors that every tensor rank holds whole, summed over tensor ranks."""
    tensor = sizes.layout.tensor
    if tensor == 1 or not model.tensor_reduced_numel:
        return Traffic()
    return Traffic(bytes=2 * (tensor - 1) / tensor * model.tensor_reduced_numel * FP32_BYTES, num_messages=1)
