"""Which chunks a rank writes, and their copy in the host's memory, from which it writes while training goes on."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence

import torch

from megatron_hgpt.checkpoint.state import Chunk


def share_of(chunks: Iterable[Chunk], rank: int, size: int) -> list[Chunk]:
    """What one data-parallel rank writes: what only it holds, and its part of what all hold alike.

    Every rank deals out the shared chunks by the same rule, largest first to the rank that has least: nobody has to
    ask. Nothing is written twice.

    Args:
        chunks: of this rank; those that are shared are the same ones on all data-parallel ranks.
        rank: among the data-parallel ranks.
        size: their number.
    """
    mine, shared = [], []
    for chunk in chunks:
        if chunk.is_first_copy:
            (shared if chunk.is_shared else mine).append(chunk)
    loads = [(0, other) for other in range(size)]
    for chunk in sorted(shared, key=lambda one: (-one.num_bytes, one.key, one.offset)):
        load, writer = loads[0]
        heapq.heapreplace(loads, (load + chunk.num_bytes, writer))
        if writer == rank:
            mine.append(chunk)
    return mine


class HostCopies:
    """Copies of tensors in the host's memory, pinned beside a GPU; a later snapshot takes the same memory again."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(copy.untyped_storage().nbytes() for copy in self._copies.values())

    @torch.no_grad()
    def take(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks with their present values, which no later step changes."""
        taken = {}
        for chunk in chunks:
            place = (chunk.key, chunk.offset)
            copy = self._copies.get(place)
            if copy is None or copy.shape != chunk.tensor.shape or copy.dtype != chunk.tensor.dtype:
                copy = torch.empty(chunk.tensor.shape, dtype=chunk.tensor.dtype, pin_memory=torch.cuda.is_available())
            taken[place] = copy.copy_(chunk.tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._copies = taken
        return [dataclasses.replace(chunk, tensor=copy) for chunk, copy in zip(chunks, taken.values(), strict=True)]
