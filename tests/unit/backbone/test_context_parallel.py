from __future__ import annotations

import pytest
import torch

from megatron_hgpt.backbone.context_parallel import natural_order, positions_of_rank


def test_a_rank_holds_a_chunk_from_the_front_and_one_from_the_back() -> None:
    assert positions_of_rank(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert positions_of_rank(8, 1, 2).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_has_as_much_causal_attention_to_compute(size: int) -> None:
    work = {int((positions_of_rank(24, rank, size) + 1).sum()) for rank in range(size)}
    assert len(work) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_ranks_parts_come_back_in_the_order_of_the_sequence(size: int) -> None:
    sequence = torch.arange(48).view(24, 2)
    gathered = torch.cat([sequence[positions_of_rank(24, rank, size)] for rank in range(size)])
    assert torch.equal(natural_order(gathered, size), sequence)
