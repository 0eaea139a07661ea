"""What a pipeline schedule keeps at once: 1F1B, or interleaved 1F1B with several model chunks per stage."""

from __future__ import annotations

from megatron_hgpt.planner.activations import ActivationModel
from megatron_hgpt.planner.request import FP32_BYTES


def in_flight(sizes: ActivationModel, pipeline_rank: int) -> list[int]:
    """Micro-batches that each model chunk of a stage holds when the first backward begins: the most it ever does.

    1F1B starts as many micro-batches as stages follow, itself included. The interleaved schedule runs groups of as
    many micro-batches as there are stages through one chunk after another.
    """
    layout = sizes.layout
    num_chunks, following = layout.virtual, layout.pipeline - pipeline_rank - 1
    started = following + 1
    if num_chunks > 1:
        started = 2 * following + (num_chunks - 1) * layout.pipeline + 1
    started = min(started, layout.num_micro_batches(sizes.request) * num_chunks)
    chunk_of = [index // layout.pipeline % num_chunks for index in range(started)]
    return [chunk_of.count(chunk) for chunk in range(num_chunks)]


def peak_activation_bytes(sizes: ActivationModel, pipeline_rank: int) -> int:
    """Kept by the micro-batches in flight, with each one's output to the next chunk (Megatron holds on to it)."""
    layout, request, total = sizes.layout, sizes.request, 0
    for chunk, count in enumerate(in_flight(sizes, pipeline_rank)):
        is_last = (pipeline_rank, chunk) == (layout.pipeline - 1, layout.virtual - 1)
        output = 0 if is_last else sizes.num_local_tokens * request.shape.hidden_size * request.element_bytes
        total += count * (sizes.chunk_bytes(pipeline_rank, chunk) + output)
    return total


def working_bytes(sizes: ActivationModel, pipeline_rank: int) -> int:
    """What lives for a moment on top, during backward: the larger of a layer's and the loss's.

    A layer: gradients of FC1's output (2f), of SwiGLU's (f), of the gathered input (h), and under full recomputation
    the recomputed layer. The loss: the logits, their fp32 copy and their gradient.
    """
    request, layout = sizes.request, sizes.layout
    shape, e = request.shape, request.element_bytes
    layer = sizes.num_tokens * (3 * shape.ffn_size // layout.tensor + shape.hidden_size) * e
    if request.recompute == "full":
        layer += sum(sizes.layer_bytes().values())
    if pipeline_rank != layout.pipeline - 1:
        return layer
    return max(layer, sizes.num_supervised * sizes.vocabulary_rows * (e + 2 * FP32_BYTES))
