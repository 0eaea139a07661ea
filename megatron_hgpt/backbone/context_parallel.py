"""Which positions of a sequence each context-parallel rank holds: Megatron's and Transformer Engine's zigzag.

A sequence is cut into 2C chunks; rank c holds chunks c and 2C-1-c, so that causal attention costs every rank the same.
"""

from __future__ import annotations

import torch


def positions_of_rank(length: int, rank: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """int64 [length / size]: positions of a sequence of `length` (a multiple of 2 * size) that `rank` holds."""
    chunks = torch.arange(length, device=device).view(2 * size, -1)
    return chunks[[rank, 2 * size - 1 - rank]].flatten()


def natural_order(gathered: torch.Tensor, size: int) -> torch.Tensor:
    """The ranks' parts [s, ...], one after another, put in the order of the sequence."""
    chunks = gathered.unflatten(0, (size, 2, -1))
    return torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)
