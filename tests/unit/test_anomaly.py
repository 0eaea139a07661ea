"""When a loss counts as a spike; what is done about it on real processes is in tests/distributed/test_anomalies.py."""

from __future__ import annotations

import pytest
import torch

from megatron_hgpt.anomaly import MIN_STEPS, AnomalyGuard
from megatron_hgpt.config import AnomalyConfig
from megatron_hgpt.distributed import DistributedContext
from megatron_hgpt.forward_step import LossReport, LossTotals, TaskLoss
from megatron_hgpt.hooks.base import Anomaly
from megatron_hgpt.samples import Task
from megatron_hgpt.testing.models import make_micro_batch

CONTEXT = DistributedContext(
    device=torch.device("cpu"), rank=0, world_size=1, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1
)


def judge(guard: AnomalyGuard, step: int, losses: dict[Task, float]) -> Anomaly | None:
    """One step of one micro-batch per task, with an update where there is to be one."""
    batches, reports, totals = [], [], LossTotals()
    for task, loss in losses.items():
        batches.append(make_micro_batch("b", task))
        per_task = {task: TaskLoss(loss_sum=10 * loss, num_tokens=10)}
        reports.append(LossReport(losses=per_task, num_content_tokens=1, num_positions=1, num_samples=1))
        totals.add(reports[-1])
    anomaly = guard.judge(step, batches, reports, totals, has_finite_gradient=True)
    return guard.settle(step, 1.0, anomaly) if anomaly is None or anomaly.action == "warn" else anomaly


@pytest.mark.parametrize(
    ("usual", "loss", "is_spike"),
    [(2.0, 5.9, False), (2.0, 6.1, True), (0.1, 1.0, False), (0.1, 1.2, True)],
    ids=["below 3 times", "above 3 times", "below 1 nat more", "above 1 nat more"],
)
def test_a_spike_is_far_above_the_median_and_a_nat_at_least(usual: float, loss: float, is_spike: bool) -> None:
    guard = AnomalyGuard(AnomalyConfig(), CONTEXT)
    for step in range(MIN_STEPS):
        assert judge(guard, step, {Task.GENERATION: usual}) is None
    anomaly = judge(guard, MIN_STEPS, {Task.GENERATION: loss})
    assert (anomaly is not None) == is_spike and guard.is_healthy != is_spike
    assert judge(guard, MIN_STEPS + 1, {Task.GENERATION: usual}) is None and guard.is_healthy


def test_each_task_has_its_own_usual_loss() -> None:
    """Steps of one task or the other, whose losses differ by more than the factor."""
    guard = AnomalyGuard(AnomalyConfig(), CONTEXT)
    for step in range(3 * MIN_STEPS):
        task, loss = (Task.GENERATION, 8.0) if step % 3 == 0 else (Task.COMPREHENSION, 1.0)
        assert judge(guard, step, {task: loss}) is None
    anomaly = judge(guard, 31, {Task.COMPREHENSION: 8.0, Task.GENERATION: 8.0})
    assert anomaly is not None and anomaly.text.startswith(
        "the loss of comprehension is 8.0000, the median of its last"
    )


def test_a_loss_that_stays_high_becomes_the_usual_one() -> None:
    guard = AnomalyGuard(AnomalyConfig(), CONTEXT)
    for step in range(50):
        judge(guard, step, {Task.GENERATION: 1.0})
    spikes = [judge(guard, 50 + step, {Task.GENERATION: 9.0}) is not None for step in range(40)]
    assert all(spikes[:25]) and not any(spikes[26:])


def test_nothing_is_compared_before_there_is_something_to_compare_with() -> None:
    guard = AnomalyGuard(AnomalyConfig(), CONTEXT)
    losses = [0.5] * (MIN_STEPS - 1) + [50.0]
    assert all(judge(guard, step, {Task.GENERATION: loss}) is None for step, loss in enumerate(losses))


def test_a_norm_that_overflows_over_all_ranks_is_not_finite() -> None:
    guard = AnomalyGuard(AnomalyConfig(), CONTEXT)
    anomaly = guard.settle(3, float("inf"), None)
    assert anomaly is not None and (anomaly.kind, anomaly.action) == ("not_finite", "skip")


def test_an_update_that_is_left_out_leaves_health_as_it_was() -> None:
    guard = AnomalyGuard(AnomalyConfig(), CONTEXT)
    guard.settle(3, float("inf"), None)
    assert guard.is_healthy, "no weight moved"
    spike = Anomaly(step=4, kind="spike", action="warn", text="")
    guard.settle(4, 1.0, spike)
    guard.settle(5, float("inf"), None)
    assert not guard.is_healthy, "the weights are still those that the spike moved"
    guard.settle(6, 1.0, None)
    assert guard.is_healthy
