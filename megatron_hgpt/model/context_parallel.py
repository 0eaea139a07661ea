"""Which positions of a sequence each context-parallel rank holds: Megatron's and Transformer Engine's zigzag.

A sequence is cut into 2C chunks; rank c holds chunks c and 2C-1-c, so that causal attention costs every rank the same.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_hgpt.samples import MicroBatch


def positions_of_rank(length: int, rank: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """int64 [length / size]: positions of a sequence of `length` (a multiple of 2 * size) that `rank` holds."""
    chunks = torch.arange(length, device=device).view(2 * size, -1)
    return chunks[[rank, 2 * size - 1 - rank]].flatten()


def natural_order(gathered: torch.Tensor, size: int) -> torch.Tensor:
    """The ranks' parts [s, ...], one after another, put in the order of the sequence."""
    chunks = gathered.unflatten(0, (size, 2, -1))
    return torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)


def shard(batch: MicroBatch, rank: int, size: int) -> tuple[MicroBatch, torch.Tensor]:
    """What one rank computes of a micro-batch.

    Args:
        batch: the whole micro-batch, not packed, padded to a multiple of 2 * size.
        rank, size: of the context-parallel group.

    Returns:
        The micro-batch at the rank's positions (still with all images), and, for each image position among them in
        row-major order, the row of the flattened image features [n * p, h] that goes there.
    """
    mine = positions_of_rank(batch.tokens.shape[1], rank, size, batch.tokens.device)
    image_mask = batch.image_mask[:, mine]
    feature_of_position = batch.image_mask.flatten().cumsum(0).sub(1).view_as(batch.image_mask)
    part = dataclasses.replace(
        batch,
        tokens=batch.tokens[:, mine],
        labels=batch.labels[:, mine],
        position_ids=batch.position_ids[:, mine],
        image_mask=image_mask,
    )
    return part, feature_of_position[:, mine][image_mask]
