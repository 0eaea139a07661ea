"""What one context-parallel rank computes of a micro-batch: its positions, and the image features that go there."""

from __future__ import annotations

import dataclasses

import torch

from megatron_hgpt.backbone.context_parallel import positions_of_rank
from megatron_hgpt.samples import MicroBatch


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
