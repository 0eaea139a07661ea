"""Batch to loss: what Megatron's schedules call for each micro-batch. Knows the model, not logging or saving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatron_hgpt.data.samples import MicroBatch

LossReport = dict[str, Any]
"""Of one micro-batch: task, loss_sum (nats, detached tensor), num_supervised_tokens, num_tokens, num_samples."""


def _loss_of(batch: MicroBatch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, LossReport]:
    """Sum over supervised positions; Megatron divides by the token count of the whole global batch.

    Returns:
        The sum that backward starts from, the number of supervised tokens (int), and the report.
    """
    loss_sum = losses.sum()
    num_tokens = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    report: LossReport = {
        "task": batch.task,
        "loss_sum": loss_sum.detach(),
        "num_supervised_tokens": losses.numel(),
        "num_tokens": int(batch.num_content_tokens),
        "num_samples": len(batch.sample_ids),
    }
    return loss_sum, num_tokens, report


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
