"""Linear, LayerNormLinear, RMSNorm and DotProductAttention; the autocast only remembers what it was told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from transformer_engine.pytorch import distributed, fp8, ops, router, tensor
from transformer_engine.pytorch.fp8 import fp8_autocast

__all__ = ["distributed", "fp8", "fp8_autocast", "ops", "router", "tensor"]


QUANTISED_CALLS: list[tuple[str, bool]] = []
"""(class, whether an FP8 autocast was on) of each GEMM, in order."""


def is_fp8_available(return_reason: bool = False) -> Any:
    """Always."""
    return (True, "") if return_reason else True


class _Linear(nn.Module):
    """What Linear and LayerNormLinear share."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Callable | None,
        init_method: Callable,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        params_dtype: torch.dtype,
        device: Any,
        rng_tracker_name: str | None = None,
    ) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias = bias, return_bias
        self.in_features = in_features // self.tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // self.tp_size if parallel_mode == "column" else out_features
        kwargs: dict[str, Any] = {"dtype": params_dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **kwargs))
        init_method(self.weight)
        self._mark(self.weight, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.out_features, **kwargs))
            if parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
            else:
                self._mark(self.bias, 0)

    @staticmethod
    def _mark(parameter: nn.Parameter, axis: int) -> None:
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, axis, 1

    def get_extra_state(self) -> torch.Tensor:
        """FP8 metadata; there is an entry in the state dict even without any."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nothing to restore."""

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        from megatron.core import tensor_parallel as mpu

        QUANTISED_CALLS.append((type(self).__name__, fp8.FP8GlobalStateManager.is_fp8_enabled()))
        group = self.tp_group
        if self.parallel_mode == "column" and self.tp_size > 1:
            gather = mpu.gather_from_sequence_parallel_region
            copy = mpu.copy_to_tensor_model_parallel_region
            x = (gather if self.sequence_parallel else copy)(x, group=group)
        y = F.linear(x, self.weight, self.bias if self.use_bias and not self.return_bias else None)
        if self.parallel_mode == "row" and self.tp_size > 1:
            scatter = mpu.reduce_scatter_to_sequence_parallel_region
            y = (scatter if self.sequence_parallel else mpu.reduce_from_tensor_model_parallel_region)(y, group=group)
        return y


class Linear(_Linear):
    """y, or (y, bias) with `return_bias`."""

    save_original_input = False  # megatron.core sets it on the attention projection in FP8

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        """[…, in] to […, out]."""
        y = self._multiply(inp)
        return (y, self.bias) if self.return_bias else y


class LayerNormLinear(_Linear):
    """RMSNorm, then the product; the norm's output comes last where `return_layernorm_output` is set."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        normalization: str,
        return_layernorm_output: bool,
        zero_centered_gamma: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, **kwargs)
        assert normalization == "RMSNorm" and not zero_centered_gamma
        self.eps, self.return_layernorm_output = eps, return_layernorm_output
        self.return_layernorm_output_gathered = False
        self.layer_norm_weight = nn.Parameter(
            torch.ones(in_features, dtype=kwargs["params_dtype"], device=kwargs["device"])
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        """[…, in], not normalised, to […, out]."""
        if self.return_layernorm_output_gathered:
            raise AssertionError("the gathered norm output costs an all-gather of [s, b, h] in bf16")
        normalised = F.rms_norm(inp, (inp.shape[-1],), self.layer_norm_weight, self.eps)
        result = [self._multiply(normalised)]
        if self.return_bias:
            result.append(self.bias)
        if self.return_layernorm_output:
            result.append(normalised)
        return tuple(result) if len(result) > 1 else result[0]


class RMSNorm(nn.RMSNorm):
    """Its weight carries the sequence-parallel flag."""

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        *,
        sequence_parallel: bool,
        zero_centered_gamma: bool,
        params_dtype: torch.dtype,
        device: Any,
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=params_dtype, device=device)
        assert not zero_centered_gamma
        self.weight.sequence_parallel = sequence_parallel


class LayerNorm(nn.LayerNorm):
    """Only its name is used."""


class DotProductAttention(nn.Module):
    """Causal attention: [s, b, heads, d], or packed [t, heads, d] with cu_seqlens; strict about its arguments."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        num_gqa_groups: int,
        attention_dropout: float,
        attn_mask_type: str,
        sequence_parallel: bool,
        tp_size: int,
        get_rng_state_tracker: Callable | None,
        tp_group: Any,
        layer_number: int,
        attention_type: str,
        softmax_scale: float | None,
        window_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        assert attention_type == "self" and attention_dropout == 0.0
        self.softmax_scale, self.window_size = softmax_scale, window_size

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> torch.Tensor:
        """[sq, b, heads/T * d], or [t, heads/T * d] packed."""
        assert attention_mask is None
        if qkv_format == "thd":
            assert attn_mask_type == "padding_causal" and max_seqlen_q is not None
            assert cu_seqlens_q is not None and cu_seqlens_kv is not None
            offsets = cu_seqlens_q.tolist()
            packed = zip(offsets[:-1], offsets[1:], strict=True)
            spans = [
                self._attend(*(t[a:b].unsqueeze(1) for t in (query_layer, key_layer, value_layer))) for a, b in packed
            ]
            return torch.cat(spans).squeeze(1)
        assert attn_mask_type in ("causal", "no_mask")
        return self._attend(query_layer, key_layer, value_layer)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        num_queries, num_keys = query.shape[0], key.shape[0]
        ahead = torch.arange(num_keys) - (torch.arange(num_queries) + num_keys - num_queries).unsqueeze(1)
        mask = ahead <= 0
        if self.window_size is not None:
            mask &= ahead >= -self.window_size[0]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        context = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()


class GroupedLinear(nn.Module):
    """Subclassed by megatron.core."""
