from __future__ import annotations

import pytest
import torch

from megatron_hgpt.backbone.context_parallel import positions_of_rank
from megatron_hgpt.model.context_parallel import shard
from megatron_hgpt.samples import Task
from megatron_hgpt.testing.models import make_micro_batch


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_image_position_of_a_rank_gets_the_feature_that_the_whole_sequence_gives_it(size: int) -> None:
    batch = make_micro_batch("x", Task.COMPREHENSION, num_samples=3)
    length = batch.tokens.shape[1]
    features = torch.arange(int(batch.image_mask.sum())) + 1000
    whole = torch.zeros_like(batch.tokens).masked_scatter(batch.image_mask, features)
    for rank in range(size):
        part, index = shard(batch, rank, size)
        mine = positions_of_rank(length, rank, size)
        placed = torch.zeros_like(part.tokens).masked_scatter(part.image_mask, features[index])
        assert torch.equal(placed, whole[:, mine])
        for name in ("tokens", "labels", "position_ids"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[:, mine])
        assert part.pixel_values is batch.pixel_values
