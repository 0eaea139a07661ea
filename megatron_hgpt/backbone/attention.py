"""Core attention through torch's scaled_dot_product_attention: what the local spec uses without Transformer Engine.

Unlike megatron.core's DotProductAttention it never writes the [b, heads, s, s] scores to memory.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_hgpt.backbone.context_parallel import natural_order

if TYPE_CHECKING:
    from megatron_hgpt.hlora.layer_spec import TaskRouting


class SDPACoreAttention(DotProductAttention):
    """Causal self-attention on local heads, with grouped queries, KV cache, sliding window and context parallelism."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        # Megatron's class refuses context parallelism, which this one has.
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)
        self.cp_group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: TaskRouting | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [sq, b, heads/T, d].
            key, value: [sk, b, kv_heads/T, d]; with a KV cache sk > sq and the queries are the last positions.
            attention_mask: bool, broadcastable to [b, 1, sq, sk], True where attention is forbidden; None is causal.
            packed_seq_params: `TaskRouting` of packed samples; query, key and value are then [s, heads/T, d], and each
                sample attends to itself alone.
            attn_mask_type, attention_bias: megatron.core's signature; only causal attention without bias is used here.

        Returns:
            [sq, b, heads/T * d]; [s, heads/T * d] of packed samples.
        """
        if attention_bias is not None:
            raise ValueError("the local attention takes no attention bias")
        if packed_seq_params is not None:
            return self._forward_packed(query, key, value, packed_seq_params.boundaries)
        if self.cp_group.size() > 1:
            return self._forward_context_parallel(query, key, value)
        return self._attend(query, key, value, attention_mask)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Causal attention of the last positions, the queries, to all of the keys."""
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

    def _forward_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: tuple[int, ...]
    ) -> torch.Tensor:
        """One call per sample: scores outside the diagonal blocks are never computed."""
        parts = []
        for start, end in pairwise(boundaries):
            q, k, v = (tensor[start:end].unsqueeze(1) for tensor in (query, key, value))
            parts.append(self._attend(q, k, v, None).squeeze(1))
        return torch.cat(parts)

    def _forward_context_parallel(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """This rank's two chunks of queries against all keys before them (`backbone.context_parallel`).

        Keys and values are gathered, with grouped heads a fraction of the queries; backward reduce-scatters them.
        """
        size, rank = self.cp_group.size(), self.cp_group.rank()
        gathered = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.cp_group)
        keys, values = natural_order(gathered, size).split(key.shape[-1], dim=-1)
        parts = []
        for chunk, queries in zip((rank, 2 * size - 1 - rank), query.chunk(2), strict=True):
            end = (chunk + 1) * len(queries)
            parts.append(self._attend(queries, keys[:end], values[:end], None))
        return torch.cat(parts)
