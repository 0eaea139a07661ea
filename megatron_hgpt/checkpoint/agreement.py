"""What one rank meets is an error on every rank: nobody waits in a collective for a peer that has given up."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megatron_hgpt.errors import CheckpointError, HealthGPTError, reason_of

T = TypeVar("T")


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns on the first rank, on every rank; every rank must call it.

    Raises:
        CheckpointError: for the first rank's error, on every rank.
    """
    outcome: list[Any] = [None]
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        try:
            outcome = [work()]
        except Exception as error:
            # Of any type: the others wait for the outcome.
            outcome = [CheckpointError(reason_of(error) or type(error).__name__)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], CheckpointError):
        raise outcome[0]
    result: T = outcome[0]
    return result


def gathered(mine: T) -> list[T]:
    """What each rank gives, in rank order; every rank must call it."""
    if not torch.distributed.is_initialized():
        return [mine]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    return every


def on_every_rank(work: Callable[[], T]) -> T:
    """Do this rank's `work`; when any rank fails, all raise. Every rank must call it.

    Raises:
        CheckpointError: of the first rank that failed; another error of this rank's own stays what it is.
        RuntimeError: another rank crashed, and a new start may help.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as problem:
        error = problem
    said = None if error is None else " ".join((reason_of(error) or type(error).__name__).split())
    is_crash = error is not None and not isinstance(error, HealthGPTError)
    problems = gathered((said, is_crash))
    if error is not None and not isinstance(error, CheckpointError):
        raise error
    for rank, (text, has_crashed) in sorted(enumerate(problems), key=lambda item: not item[1][1]):
        if text is not None:
            where = f" (rank {rank} of {len(problems)})" if len(problems) > 1 else ""
            raise (RuntimeError if has_crashed else CheckpointError)(f"{text}{where}") from error
    return result  # type: ignore[return-value]


def place_of_rank() -> str:
    """``rank 3 on node-7``, for messages."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return f"rank {rank} on {platform.node()}"
