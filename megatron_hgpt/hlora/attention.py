"""Core attention through torch's scaled_dot_product_attention: what the local spec uses without Transformer Engine.

Against megatron.core's DotProductAttention it never writes the [b, heads, s, s] scores to memory.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.nn import functional as F


class SDPACoreAttention(DotProductAttention):
    """Causal self-attention on local heads, with grouped queries, KV cache and sliding window."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [sq, b, heads/T, d].
            key, value: [sk, b, kv_heads/T, d]; with a KV cache sk > sq and the queries are the last positions.
            attention_mask: bool, broadcastable to [b, 1, sq, sk], True where attention is forbidden; None is causal.
            attn_mask_type, attention_bias, packed_seq_params: megatron.core's signature; only causal attention
                without bias is used here.

        Returns:
            [sq, b, heads/T * d].
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("the local attention takes neither an attention bias nor packed sequences")
        num_queries, num_keys = query.shape[0], key.shape[0]
        window = self.scale_mask_softmax.window_size
        if window is not None and num_keys <= window[0] + 1:
            window = None  # every earlier key is inside it: the kernel's own causal path needs no mask in memory
        mask = None if attention_mask is None else ~attention_mask
        is_causal = mask is None and num_queries == num_keys and window is None
        if mask is None and not is_causal and (num_queries > 1 or window is not None):
            ahead = torch.arange(num_keys, device=query.device) - (
                torch.arange(num_queries, device=query.device) + num_keys - num_queries
            ).unsqueeze(1)
            mask = ahead <= 0
            if window is not None:
                mask &= ahead >= -window[0]
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()
