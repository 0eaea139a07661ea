"""Batch to loss: what Megatron's schedules call for each micro-batch. Knows the model, not logging or saving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatron_hgpt.samples import IGNORE_INDEX, MicroBatch, Task

LossReport = dict[str, Any]
"""Of one micro-batch: losses (task -> sum in nats and number of supervised tokens, detached), num_tokens (content),
num_positions (with padding), num_samples."""


def _loss_of(batch: MicroBatch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, LossReport]:
    """Sum over supervised positions; Megatron divides by the token count of the whole global batch.

    Returns:
        The sum that backward starts from, the number of supervised tokens (int), and the report.
    """
    from megatron.core import parallel_state

    loss_sum = losses.sum()
    num_tokens = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    # Context-parallel ranks share the micro-batch, each with losses of its own: one of them counts the rest.
    is_counter = parallel_state.get_context_parallel_rank() == 0
    report: LossReport = {
        "losses": _losses_per_task(batch, losses.detach()),
        "num_tokens": batch.num_content_tokens * is_counter,
        "num_positions": batch.tokens.numel() * is_counter,
        "num_samples": len(batch.sample_ids) * is_counter,
    }
    return loss_sum, num_tokens, report


def _losses_per_task(batch: MicroBatch, losses: torch.Tensor) -> dict[Task, tuple[torch.Tensor, torch.Tensor | int]]:
    if batch.token_tasks is None:
        return {task: (losses.sum(), losses.numel()) for task in batch.tasks}
    codes = batch.token_tasks.T[batch.labels.T != IGNORE_INDEX]  # in the order of the losses
    return {task: (losses[codes == task.code].sum(), (codes == task.code).sum()) for task in batch.tasks}


def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Callable]:
    """Run the model on the next micro-batch.

    Args:
        batches: this rank's micro-batches of the step.
        model: the (wrapped) `HealthGPT`.

    Returns:
        The losses of the supervised positions (hidden states before the last pipeline stage), and the function that
        reduces losses.
    """
    batch = next(batches).to(torch.device(torch.cuda.current_device()))
    return model(batch), partial(_loss_of, batch)
