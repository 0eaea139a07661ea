"""Batch to loss: what Megatron's schedules call for each micro-batch. Knows the model, not logging or saving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from megatron_hgpt.samples import IGNORE_INDEX, TASKS, MicroBatch, Task

if TYPE_CHECKING:
    from megatron_hgpt.distributed import DistributedContext
    from megatron_hgpt.model.healthgpt import HealthGPT


@dataclass(kw_only=True, slots=True)
class TaskLoss:
    """Cross-entropy over one task's supervised tokens; scalar tensors (detached) until they are summed."""

    loss_sum: torch.Tensor | float = 0.0
    """In nats."""
    num_tokens: torch.Tensor | float = 0.0

    @property
    def mean(self) -> float:
        """Nats per supervised token."""
        return float(self.loss_sum) / max(float(self.num_tokens), 1.0)


@dataclass(kw_only=True, slots=True)
class LossReport:
    """What one rank's forward pass of one micro-batch says."""

    losses: dict[Task, TaskLoss]
    num_content_tokens: int
    """Positions that hold text, image features or VQ tokens."""
    num_positions: int
    """Content tokens and padding."""
    num_samples: int


@dataclass(kw_only=True, slots=True)
class LossTotals:
    """Sums of `LossReport`s: over micro-batches with `add`, over ranks with `reduce`."""

    losses: dict[Task, TaskLoss] = field(default_factory=lambda: {task: TaskLoss() for task in TASKS})
    num_content_tokens: float = 0.0
    num_positions: float = 0.0
    num_samples: float = 0.0

    def add(self, report: LossReport) -> None:
        """Count one micro-batch in. On a GPU this waits for the micro-batch."""
        for task, loss in report.losses.items():
            total = self.losses[task]
            total.loss_sum, total.num_tokens = (
                float(total.loss_sum) + float(loss.loss_sum),
                float(total.num_tokens) + float(loss.num_tokens),
            )
        self.num_content_tokens += report.num_content_tokens
        self.num_positions += report.num_positions
        self.num_samples += report.num_samples

    def reduce(self, context: DistributedContext) -> None:
        """Sum over data-parallel ranks, in place; every rank must call it.

        Only the last pipeline stage has reports; every stage is told.
        """
        from megatron.core import parallel_state

        values = [value for loss in self.losses.values() for value in (loss.loss_sum, loss.num_tokens)]
        values += [self.num_content_tokens, self.num_positions, self.num_samples]
        sums = torch.tensor(values, dtype=torch.float64, device=context.device)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if context.pp_size > 1:
            torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        summed = iter(sums.tolist())
        self.losses = {task: TaskLoss(loss_sum=next(summed), num_tokens=next(summed)) for task in self.losses}
        self.num_content_tokens, self.num_positions, self.num_samples = summed

    @property
    def trained_tasks(self) -> list[Task]:
        """Tasks with a supervised token."""
        return [task for task, loss in self.losses.items() if loss.num_tokens > 0]

    @property
    def loss_per_task(self) -> dict[str, float]:
        """Task -> mean loss per supervised token, for the tasks that have any."""
        return {task.value: self.losses[task].mean for task in self.trained_tasks}

    @property
    def all_tasks(self) -> TaskLoss:
        """Loss and supervised tokens of all tasks together."""
        return TaskLoss(
            loss_sum=sum(float(loss.loss_sum) for loss in self.losses.values()),
            num_tokens=sum(float(loss.num_tokens) for loss in self.losses.values()),
        )


def _loss_of(batch: MicroBatch, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, LossReport]:
    """Sum over supervised positions; Megatron divides by the token count of the whole global batch.

    Returns:
        The sum that backward starts from, the number of supervised tokens (int), and the report, which Megatron's
        schedules collect as it is.
    """
    from megatron.core import parallel_state

    loss_sum = losses.sum()
    num_tokens = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    # Context-parallel ranks share the micro-batch, each with losses of its own: one of them counts the rest.
    is_counter = parallel_state.get_context_parallel_rank() == 0
    report = LossReport(
        losses=_losses_per_task(batch, losses.detach()),
        num_content_tokens=batch.num_content_tokens * is_counter,
        num_positions=batch.tokens.numel() * is_counter,
        num_samples=len(batch.sample_ids) * is_counter,
    )
    return loss_sum, num_tokens, report


def _losses_per_task(batch: MicroBatch, losses: torch.Tensor) -> dict[Task, TaskLoss]:
    if batch.token_tasks is None:
        return {task: TaskLoss(loss_sum=losses.sum(), num_tokens=losses.numel()) for task in batch.tasks}
    codes = batch.token_tasks.T[batch.labels.T != IGNORE_INDEX]  # in the order of the losses
    return {
        task: TaskLoss(loss_sum=losses[codes == task.code].sum(), num_tokens=(codes == task.code).sum())
        for task in batch.tasks
    }


def forward_step(batches: Iterator[MicroBatch], model: HealthGPT) -> tuple[torch.Tensor, Callable]:
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
