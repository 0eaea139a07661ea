"""Bytes that autograd keeps between forward and backward: frozen base, H-LoRA on every linear, flash attention.

Derived from `hlora.linear`, `hlora.gate`, `backbone.attention` and Megatron's layer, term by term. Units: N
tokens of a micro-batch on this context rank (s b / C), n = N / T of them on this tensor rank (sequence parallel), h
hidden, q / g query and key features per rank, f FFN features per rank, r rank, k experts, S / S' H-LoRA sections of QKV
/ FC1, m supervised positions, V vocabulary rows per rank, e bytes per element. A frozen linear keeps no input; what
keeps the inputs of the linears is P, where the plugin is trained. Full recomputation keeps the layers' inputs only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_hgpt.parameters import ADAPTER_GROUPS, HLORA_GROUPS
from megatron_hgpt.planner.layouts import Layout
from megatron_hgpt.planner.request import FP32_BYTES, PlanRequest
from megatron_hgpt.samples import Task
from megatron_hgpt.text.vocabulary import Vocabulary

_INT64_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class ActivationModel:
    """Sizes of one micro-batch of one task on one rank.

    Attributes:
        fused_swiglu: gate and up go through Megatron's fused function, which keeps its input only; the unfused one
            (on a CPU) keeps silu(gate) and a copy of up as well.
    """

    request: PlanRequest
    layout: Layout
    task: Task
    fused_swiglu: bool = True

    @property
    def micro_batch_size(self) -> int:
        """b: samples."""
        return self.request.config.training.micro_batch_size

    @cached_property
    def num_tokens(self) -> int:
        """N: tokens of a micro-batch, with padding, on this context-parallel rank."""
        return self.layout.padded_length(self.request) // self.layout.context * self.micro_batch_size

    @property
    def num_local_tokens(self) -> int:
        """n = N / T."""
        return self.num_tokens // self.layout.tensor

    @property
    def num_supervised(self) -> int:
        """m: supervised positions of a micro-batch, the last ones of each sample, on the context rank with most.

        That is the first rank: of the 2C chunks of a sequence it holds the first and the last.
        """
        count, context = self.request.supervised_tokens[self.task], self.layout.context
        if context > 1:
            chunk = self.num_tokens // self.micro_batch_size // 2
            count = min(count, chunk) + max(0, count - (2 * context - 1) * chunk)
        return count * self.micro_batch_size

    @property
    def vocabulary_rows(self) -> int:
        """V: rows of the head on this rank."""
        return Vocabulary.from_config(self.request.config.model).padded_size // self.layout.tensor

    @property
    def num_image_positions(self) -> int:
        """Image features of a micro-batch."""
        return (
            self.request.images_per_sample
            * self.micro_batch_size
            * self.request.config.model.vision.num_image_tokens
        )  # fmt: skip

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
        e, local, hidden = self.request.element_bytes, self.num_local_tokens, self.request.shape.hidden_size
        ffn = self.num_tokens * self.request.shape.ffn_size // self.layout.tensor
        return {
            "norms": 2 * (local * hidden * e + local * FP32_BYTES),
            # Transformer Engine keeps the norms' outputs a second time in FP8.
            "fp8_inputs": 2 * local * hidden if self.request.precision == "fp8" else 0,
            "hlora_inputs": (2 * local * hidden + ffn) * e if self.trains_plugin else 0,
            "hlora_branches": self._branch_bytes(),
            "attention": self._attention_bytes(),
            "swiglu": (2 if self.fused_swiglu else 4) * ffn * e,
        }

    def _attention_bytes(self, *, is_recomputed: bool = False) -> int:
        """Rotary tables, queries, keys, values, the kernel's output with its log-sum-exp, and P's input."""
        shape, tensor, e = self.request.shape, self.layout.tensor, self.request.element_bytes
        tokens, trained = self.num_tokens, self.trains_plugin
        query, key = shape.num_heads * shape.head_dim // tensor, shape.num_kv_heads * shape.head_dim // tensor
        tables = 4 * tokens // self.micro_batch_size * shape.head_dim * e
        # QKV's output lives on in the values, which are a view of it; rotated queries and keys are copies.
        inputs = tokens * (2 * query + 3 * key) * e
        if is_recomputed:
            return tables + inputs + trained * tokens * query * e
        # The kernel keeps the layout of its queries, so its output is P's input as it is.
        joined = 0
        if self.layout.context > 1 and self.request.uses_local_layers:
            # All of the context ranks' keys and values are gathered; the outputs of two chunks are joined by a copy.
            inputs = tokens * (query + 2 * key * self.layout.context) * e
            joined = trained * tokens * query * e
        kernel = tokens * query * e + tokens * shape.num_heads // tensor * FP32_BYTES
        return tables + inputs + kernel + joined

    def _branch_bytes(self) -> int:
        """z and the dropout mask of the gate, u where B is trained, B joined over the parts of a fused linear."""
        from megatron_hgpt.hlora.layer_spec import linear_layouts

        plugin = self.request.config.model.hlora.of(self.task)
        if plugin is None:
            return 0
        override = self.request.stage.dropout.get(self.task)
        dropout = plugin.dropout if override is None else override
        rank, elements = plugin.lora_rank, 0
        for name, layout in linear_layouts(self.request.shape).items():
            is_column = name in ("linear_qkv", "linear_fc1")
            sections, parts = layout.num_sections, layout.part_sizes
            elements += self.num_local_tokens * sections * (rank + plugin.num_experts)
            elements += self.num_local_tokens * sections * rank if dropout > 0 else 0
            if self.trains_plugin:  # gathered over T in front of a column-parallel B
                elements += (self.num_tokens if is_column else self.num_local_tokens) * sections * rank
            if sections == 1 and len(parts) > 1:
                elements += sum(parts) // self.layout.tensor * rank
        return elements * self.request.element_bytes

    def kept_layer_bytes(self) -> int:
        """One layer under the request's recomputation."""
        if self.request.recompute == "full":
            return self.num_local_tokens * self.request.shape.hidden_size * self.request.element_bytes
        parts = self.layer_bytes()
        if self.request.recompute == "selective":
            parts["attention"] = self._attention_bytes(is_recomputed=True)
        return sum(parts.values())

    def _first_stage_bytes(self) -> int:
        """Adapter: tower features, its hidden layer before and after GELU; alike on every tensor-parallel rank."""
        if not self.trains_adapter:
            return 0
        width = self.request.config.model.vision.hf_config["hidden_size"] + 2 * self.request.shape.hidden_size
        return self.num_image_positions * width * self.request.element_bytes

    def _last_stage_bytes(self) -> int:
        """Final norm, and the softmax (fp32) of the supervised positions with their targets and indices."""
        hidden, e, count = self.request.shape.hidden_size, self.request.element_bytes, self.num_supervised
        head_input = count * hidden * e if self.trains_vocabulary else 0
        softmax = count * (self.vocabulary_rows * FP32_BYTES + 3 * _INT64_BYTES)
        return self.num_local_tokens * (hidden * e + FP32_BYTES) + head_input + softmax

    def chunk_bytes(self, pipeline_rank: int, chunk: int = 0) -> int:
        """All that one micro-batch keeps on one model chunk of a pipeline stage."""
        layout = self.layout
        total = layout.layers_per_stage[pipeline_rank] // layout.virtual * self.kept_layer_bytes()
        if self.request.recompute == "full":  # the layers' common rotary angles
            total += self.num_tokens // self.micro_batch_size * self.request.shape.head_dim * FP32_BYTES
        if pipeline_rank == chunk == 0:
            total += self._first_stage_bytes()
        if (pipeline_rank, chunk) == (layout.pipeline - 1, layout.virtual - 1):
            total += self._last_stage_bytes()
        return total
