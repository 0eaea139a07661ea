"""Bytes that autograd keeps between forward and backward: frozen base, H-LoRA on every linear, flash attention.

Derived from `megatron_hgpt.hlora.linear`, `hlora.gate`, `hlora.attention` and Megatron's layer, term by term. Units: N
tokens of a micro-batch on this context rank (s b / C), n = N / T of them on this tensor rank (sequence parallel), h
hidden, q / g query and key features per rank, f FFN features per rank, r rank, k experts, S / S' H-LoRA sections of QKV
/ FC1, m supervised positions, V vocabulary rows per rank, e bytes per element. A frozen linear keeps no input; what
keeps the inputs of the linears is P, where the plugin is trained. Full recomputation keeps the layers' inputs only.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hgpt.data.samples import Task
from megatron_hgpt.model.vocabulary import Vocabulary
from megatron_hgpt.planner.layouts import Layout
from megatron_hgpt.planner.request import PlanRequest
from megatron_hgpt.stages import ADAPTER_GROUPS, HLORA_GROUPS

_FP32, _INT64 = 4, 8


@dataclass(frozen=True, kw_only=True)
class ActivationModel:
    """Sizes of one micro-batch of one task on one rank.

    Attributes:
        fused_swiglu: gate and up go through Megatron's fused function, which keeps its input only; the unfused one
            (on a CPU) keeps silu(gate) as well.
    """

    request: PlanRequest
    layout: Layout
    task: Task
    fused_swiglu: bool = True

    @property
    def num_tokens(self) -> int:
        """N: tokens of a micro-batch on this context-parallel rank."""
        micro = self.request.config.training.micro_batch_size
        return self.request.sequence_length * micro // self.layout.context

    @property
    def num_local_tokens(self) -> int:
        """n = N / T."""
        return self.num_tokens // self.layout.tensor

    @property
    def num_supervised(self) -> int:
        """m: supervised positions of a micro-batch on this context-parallel rank, spread evenly."""
        counts = self.request.supervised_tokens
        return -(-counts[self.task] * self.request.config.training.micro_batch_size // self.layout.context)

    @property
    def vocabulary_rows(self) -> int:
        """V: rows of the head on this rank."""
        return Vocabulary.from_config(self.request.config.model).padded_size // self.layout.tensor

    def _trains(self, groups: dict[str, Task]) -> bool:
        return any(groups.get(group) is self.task for group in self.request.stage.trainable)

    @property
    def trains_plugin(self) -> bool:
        """The stage trains this task's H-LoRA."""
        return self._trains(HLORA_GROUPS)

    @property
    def trains_adapter(self) -> bool:
        """The stage trains this task's adapter."""
        return self._trains(ADAPTER_GROUPS)

    @property
    def trains_vocabulary(self) -> bool:
        """The stage trains embedding and head, or their new rows."""
        return bool({"new_rows", "vocabulary"} & set(self.request.stage.trainable))

    def layer_bytes(self) -> dict[str, int]:
        """One layer without recomputation, by what keeps it."""
        shape, tensor, e = self.request.shape, self.layout.tensor, self.request.element_bytes
        tokens, local = self.num_tokens, self.num_local_tokens
        micro = self.request.config.training.micro_batch_size
        query, key = shape.num_heads * shape.head_dim // tensor, shape.num_kv_heads * shape.head_dim // tensor
        ffn, heads = shape.ffn_size // tensor, shape.num_heads // tensor
        trained = self.trains_plugin
        # The attention output [s, b, q] is a copy of the kernel's [b, s, q] where b > 1; P keeps the copy.
        output_copies = 1 + (micro > 1 and trained)
        table = self.request.sequence_length // self.layout.context * shape.head_dim
        # Transformer Engine keeps the norm's output in FP8 too, beside the one in bf16 that P reads.
        narrow = 2 * local * shape.hidden_size if self.request.precision == "fp8" else 0
        return {
            "norms": 2 * (local * shape.hidden_size * e + local * _FP32) + narrow,
            "hlora_inputs": (2 * local * shape.hidden_size + tokens * ffn) * e if trained else 0,
            "hlora_branches": self._branch_bytes(),
            "attention": tokens * (query + 2 * key + query + key + output_copies * query) * e
            + tokens * heads * _FP32
            + 4 * table * e,
            "swiglu": tokens * (2 if self.fused_swiglu else 3) * ffn * e,
        }

    def _branch_bytes(self) -> int:
        """z and the dropout mask of the gate, u where B is trained, B joined over the parts of a fused linear."""
        from megatron_hgpt.hlora.spec import linear_layouts

        plugin = getattr(self.request.config.model.hlora, self.task.value)
        if plugin is None:
            return 0
        override = self.request.stage.dropout.get(self.task)
        dropout = plugin.dropout if override is None else override
        tensor, rank = self.layout.tensor, plugin.lora_rank
        elements = 0
        for name, layout in linear_layouts(self.request.shape).items():
            is_column = name in ("linear_qkv", "linear_fc1")
            sections, parts = layout.num_sections, layout.part_sizes
            elements += self.num_local_tokens * sections * (rank + plugin.num_experts)
            elements += self.num_local_tokens * sections * rank if dropout > 0 else 0
            if self.trains_plugin:  # gathered over T in front of a column-parallel B
                elements += (self.num_tokens if is_column else self.num_local_tokens) * sections * rank
            if sections == 1 and len(parts) > 1:
                elements += sum(parts) // tensor * rank
        return elements * self.request.element_bytes

    def kept_layer_bytes(self) -> int:
        """One layer under the request's recomputation."""
        shape, e = self.request.shape, self.request.element_bytes
        if self.request.recompute == "full":
            return self.num_local_tokens * shape.hidden_size * e
        parts = self.layer_bytes()
        if self.request.recompute == "selective":  # core attention: its output is P's input, all else is its input
            query = shape.num_heads * shape.head_dim // self.layout.tensor
            copies = 2 if self.request.config.training.micro_batch_size > 1 or not self.trains_plugin else 1
            parts["attention"] -= self.num_tokens * shape.num_heads // self.layout.tensor * _FP32
            parts["attention"] -= (copies - 1) * self.num_tokens * query * e
        return sum(parts.values())

    def first_stage_bytes(self) -> int:
        """Adapter: tower features, its hidden layer before and after GELU; alike on every tensor-parallel rank."""
        request = self.request
        sizes = request.config.model.vision.hf_config
        num_images = request.images_per_sample * request.config.training.micro_batch_size
        if not num_images:
            return 0
        positions = num_images * (sizes["image_size"] // sizes["patch_size"]) ** 2
        if not self.trains_adapter:
            return 0
        return positions * (sizes["hidden_size"] + 2 * request.shape.hidden_size) * request.element_bytes

    def last_stage_bytes(self) -> int:
        """Final norm, and the softmax (fp32) of the supervised positions with their targets and indices."""
        hidden, e, count = self.request.shape.hidden_size, self.request.element_bytes, self.num_supervised
        head_input = count * hidden * e if self.trains_vocabulary else 0
        softmax = count * (self.vocabulary_rows * _FP32 + 3 * _INT64)
        return self.num_local_tokens * (hidden * e + _FP32) + head_input + softmax

    def stage_bytes(self, pipeline_rank: int) -> int:
        """All that one micro-batch keeps on a pipeline stage."""
        total = self.layout.layers_per_stage[pipeline_rank] * self.kept_layer_bytes()
        if pipeline_rank == 0:
            total += self.first_stage_bytes()
        if pipeline_rank == self.layout.pipeline - 1:
            total += self.last_stage_bytes()
        return total

    def in_flight(self, pipeline_rank: int) -> float:
        """Micro-batches that a stage keeps at once; a chunk of an interleaved stage keeps its share of one.

        1F1B: as many as stages follow, itself included. Interleaved (v chunks, P stages): 2 (P - rank - 1) + (v - 1) P
        chunks of warm-up, and the one at work.
        """
        from megatron_hgpt.validation import global_batch_size

        training, stages, chunks = self.request.config.training, self.layout.pipeline, self.layout.virtual
        count = global_batch_size(self.request.config) // (training.micro_batch_size * self.layout.data)
        if chunks == 1:
            return min(stages - pipeline_rank, count)
        return min(2 * (stages - pipeline_rank - 1) + (chunks - 1) * stages + 1, count * chunks) / chunks

    def peak_bytes(self, pipeline_rank: int) -> int:
        """Kept by the micro-batches in flight, with each one's output to the next stage (Megatron holds on to it)."""
        outputs = self.layout.virtual - (pipeline_rank == self.layout.pipeline - 1)  # the last chunk ends in the loss
        size = outputs * self.num_local_tokens * self.request.shape.hidden_size * self.request.element_bytes
        return round(self.in_flight(pipeline_rank) * (self.stage_bytes(pipeline_rank) + size))

    def working_bytes(self, pipeline_rank: int) -> int:
        """What lives for a moment on top, during backward: the larger of a layer's and the loss's.

        A layer: gradients of FC1's output (2f), of SwiGLU's (f), of the gathered input (h), and under full
        recomputation the recomputed layer. The loss: the logits, their fp32 copy and their gradient.
        """
        shape, e = self.request.shape, self.request.element_bytes
        layer = self.num_tokens * (3 * shape.ffn_size // self.layout.tensor + shape.hidden_size) * e
        if self.request.recompute == "full":
            layer += sum(self.layer_bytes().values())
        if pipeline_rank != self.layout.pipeline - 1:
            return layer
        return max(layer, self.num_supervised * self.vocabulary_rows * (e + 2 * _FP32))
