"""Which samples share a packed row: built once, from lengths alone, before any sample is read."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np

from megatron_hgpt.errors import ConfigError

Indices = np.ndarray[Any, np.dtype[np.int64]]


def pack(lengths: Indices, capacity: int, *, seed: int) -> list[Indices]:
    """Best-fit decreasing: each row takes the longest sample that still fits until none does.

    Samples of one length are drawn in an order that `seed` decides, so rows are not runs of neighbours.

    Args:
        lengths: int64 [n], tokens of each sample with its image features, at least 1.
        capacity: tokens of a row.
        seed: of the order.

    Returns:
        Indices into `lengths` of each row; together each index once.

    Raises:
        ConfigError: a sample is longer than a row.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ConfigError(
            f"data.pack_length={capacity} is shorter than the longest sample ({lengths.max()} tokens); raise it"
        )
    order = np.random.default_rng(seed).permutation(len(lengths))
    waiting: dict[int, list[int]] = {}
    for index in order:
        waiting.setdefault(int(lengths[index]), []).append(int(index))
    available = sorted(waiting)
    rows: list[Indices] = []
    while available:
        row: list[int] = []
        room = capacity
        while (place := bisect_right(available, room)) > 0:
            length = available[place - 1]
            row.append(waiting[length].pop())
            room -= length
            if not waiting[length]:
                del available[place - 1]
        rows.append(np.array(row, dtype=np.int64))
    return rows
