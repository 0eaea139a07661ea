"""H-LoRA on Transformer Engine's parallel linears: the branch of `linear` beside a base that may run in FP8.

This module is imported only where Transformer Engine is used: without it megatron.core puts mocks in place of its
classes.

    column      Transformer Engine normalises, (gathers under SP,) and multiplies. It also returns the norm's output:
                local tokens, not quantised, never gathered and never written into. From it comes u, the only tensor
                of the branch that is gathered: [s, b, r].
    row         As in the local linear, z is reduced before the gate.

The branch is plain torch in the parameters' type. Transformer Engine's FP8 autocast reaches its own modules only, so
P, gate and B compute in bf16 inside it too.

The base weights are frozen: Transformer Engine then makes no weight gradient and saves no quantised transpose of the
input. In FP8 a column linear keeps the norm's output twice for the backward pass, in bf16 for P and in FP8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TEQuantizationParams,
    TEQuantizationRecipe,
    TERowParallelLinear,
)

from megatron_hgpt.hlora.linear import HLoRAColumnMixin, HLoRALinearMixin, HLoRARowMixin

if TYPE_CHECKING:
    from megatron.core.quantization.quant_config import QuantizationConfig

_FP8_WHILE_TRAINING = TEQuantizationParams(
    training_recipe=TEQuantizationRecipe(override_quantized_autocast=False),
    # No recipe: bf16, whatever the surrounding autocast says.
    evaluation_recipe=TEQuantizationRecipe(),
)


class _BF16EvaluationMixin(HLoRALinearMixin):
    """FP8 in training only: decoding feeds one token per sample, and FP8 GEMMs need a multiple of eight."""

    te_quant_params: TEQuantizationParams | None

    def finish_init(self, quantization_config: QuantizationConfig | None) -> None:
        """GPTModel calls this on every linear. A quantisation that the user configured for this layer is kept."""
        super().finish_init(quantization_config)  # type: ignore[misc]  # the Transformer Engine class has it
        if quantization_config is None:
            self.te_quant_params = _FP8_WHILE_TRAINING


class HLoRATEColumnParallelLinear(_BF16EvaluationMixin, HLoRAColumnMixin, TEColumnParallelLinear):
    """`TEColumnParallelLinear` with H-LoRA, for a column-parallel linear without a norm in front."""


class HLoRATELayerNormColumnParallelLinear(_BF16EvaluationMixin, HLoRAColumnMixin, TELayerNormColumnParallelLinear):
    """`TELayerNormColumnParallelLinear` (norm and QKV, norm and FC1) with H-LoRA."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s/T or s, b, in], not normalised, to [s, b, out/T]."""
        active = self._active_plugins()
        # Read by Transformer Engine at each call. The gathered variant would all-gather bf16 in front of an FP8 GEMM.
        self.return_layernorm_output = bool(active)
        self.return_layernorm_output_gathered = False
        result = TELayerNormColumnParallelLinear.forward(self, input_)
        if not active:
            return result
        if self.te_return_bias:
            output, bias, normalised = result
        else:
            (output, normalised), bias = result
        return self.add_branches(output, active, self.gathered_u(active, normalised)), bias


class HLoRATERowParallelLinear(_BF16EvaluationMixin, HLoRARowMixin, TERowParallelLinear):
    """`TERowParallelLinear` (attention projection, FC2) with H-LoRA."""
