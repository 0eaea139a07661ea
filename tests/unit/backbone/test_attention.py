"""Core attention: the sliding window against explicit softmax, and the kernel's causal path where no mask is needed."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megatron_hgpt.backbone.attention import SDPACoreAttention
from megatron_hgpt.backbone.context_parallel import natural_order, positions_of_rank

HEADS, DIM = 2, 8


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: tuple[int, int] | None) -> Any:
    core = SimpleNamespace(scale_mask_softmax=SimpleNamespace(window_size=window), softmax_scale=0.3)
    return SDPACoreAttention._attend(core, query, key, value, None)  # type: ignore[arg-type]


def explicit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, left: int | None) -> torch.Tensor:
    """The formula: position i sees i - left … i."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * 0.3
    for i in range(num_queries):
        position = i + num_keys - num_queries
        for j in range(num_keys):
            if j > position or (left is not None and j < position - left):
                scores[:, :, i, j] = float("-inf")
    return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value).flatten(2)


@pytest.mark.parametrize("left", [None, 0, 2, 4, 5, 6, 7])
@pytest.mark.parametrize("num_queries", [6, 3, 1])
def test_equals_the_formula(left: int | None, num_queries: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(n, 2, HEADS, DIM, dtype=torch.float64) for n in (num_queries, 6, 6))
    got = attend(query, key, value, None if left is None else (left, 0))
    torch.testing.assert_close(got, explicit(query, key, value, left), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("left", "has_mask"), [(5, False), (4, True)])
def test_a_window_as_long_as_the_keys_makes_no_mask(left: int, has_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kwargs: seen.append(kwargs) or real(*args, **kwargs)
    )
    attend(*(torch.randn(6, 1, HEADS, DIM) for _ in range(3)), (left, 0))
    assert (seen[0]["attn_mask"] is not None) == has_mask
    assert seen[0]["is_causal"] != has_mask


@pytest.mark.parametrize("left", [None, 1])
def test_packed_samples_attend_to_themselves_alone(left: int | None) -> None:
    torch.manual_seed(0)
    packed = [torch.randn(9, HEADS, DIM, dtype=torch.float64) for _ in range(3)]
    window = None if left is None else (left, 0)
    core = SimpleNamespace(scale_mask_softmax=SimpleNamespace(window_size=window), softmax_scale=0.3)
    core._attend = functools.partial(SDPACoreAttention._attend, core)  # type: ignore[arg-type]
    got = SDPACoreAttention._forward_packed(core, *packed, (0, 4, 5, 9))  # type: ignore[arg-type]
    for start, end in ((0, 4), (4, 5), (5, 9)):
        alone = explicit(*(tensor[start:end].unsqueeze(1) for tensor in packed), left)
        torch.testing.assert_close(got[start:end], alone.squeeze(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_context_parallel_chunks_come_back_in_order(size: int) -> None:
    sequence = torch.arange(12 * size)
    parts = [sequence[positions_of_rank(len(sequence), rank, size)] for rank in range(size)]
    assert all(len(part) == 12 for part in parts)
    assert torch.equal(natural_order(torch.cat(parts), size), sequence)
