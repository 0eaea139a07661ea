"""Which samples share a packed row: built once, from lengths alone, before any sample is read."""

from __future__ import annotations

import logging
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from megatron_hgpt.errors import ConfigError
from megatron_hgpt.samples import Task

logger = logging.getLogger(__name__)

Indices = NDArray[np.int64]


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


def packed_rows(
    samples: dict[Task, Indices], all_lengths: Indices, *, mixed: bool, capacity: int, seed: int
) -> dict[Task | None, list[Indices]]:
    """Rows of sample indices, per task or (under None) of both together; says what packing saves.

    Args:
        samples: of each task, as indices into `all_lengths`.
        all_lengths: int64 [n], tokens of every sample.
        mixed: whether a row may hold both tasks.
        capacity: tokens of a row.
        seed: of the order.

    Raises:
        ConfigError: a sample is longer than a row.
    """
    groups: dict[Task | None, Indices] = dict(samples.items())
    if mixed:
        groups = {None: np.concatenate(list(samples.values()))}
    result: dict[Task | None, list[Indices]] = {}
    for task, members in groups.items():
        lengths = all_lengths[members]
        result[task] = [members[row] for row in pack(lengths, capacity, seed=seed)]
        positions = len(result[task]) * capacity
        logger.info(
            "packing (%s): %d samples of %d tokens (median) in %d rows of at most %d; rows are %.1f %% full, and "
            "padding every sample to %d would take %.1f x the positions",
            "both tasks" if task is None else task.value,
            len(members),
            np.median(lengths),
            len(result[task]),
            capacity,
            100 * lengths.sum() / positions,
            capacity,
            len(members) * capacity / positions,
        )
    return result
