"""Decides, before weights move, what becomes of a step whose loss or gradient is not finite, or whose loss jumps.

Every rank decides alike: one small reduction per step says whether any rank saw something, and only then do the ranks
tell each other what. The update of such a step has not been made, so weights and moments stay finite.

Megatron's own means are not used. `check_for_nan_in_grad` raises on the rank that sees it and leaves its peers in the
reduction. Its rerun state machine ("alpha-level", says its file) runs a step twice more to tell a broken GPU from a
broken sample, and ends the job for a rerun elsewhere; it wraps the data iterator and keeps state of its own in the
checkpoint, and has neither skip nor rollback.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from megatron_hgpt.errors import DivergedError
from megatron_hgpt.hooks.base import Anomaly

if TYPE_CHECKING:
    from megatron_hgpt.config import AnomalyConfig
    from megatron_hgpt.distributed import DistributedContext
    from megatron_hgpt.forward_step import LossReport, LossTotals
    from megatron_hgpt.samples import MicroBatch

Kind = Literal["not_finite", "spike"]
Policy = Literal["warn", "stop", "skip", "rollback"]

WINDOW = 50
"""Steps whose median a loss is compared with."""
MIN_STEPS = 10
"""Steps of a task before its loss is compared with anything; also after a resume, which starts with none."""
MIN_JUMP = 1.0
"""Nats above the median that a spike has at least."""
_MAX_NAMED = 4
"""Micro-batches, and samples of each, that a message names."""


class AnomalyGuard:
    """Looks at every step, and keeps count of the limits.

    Args:
        config: policies and limits.
        context: this rank's place.
    """

    def __init__(self, config: AnomalyConfig, context: DistributedContext) -> None:
        self.config, self.context = config, context
        self.is_healthy = True
        """False from an update that was made on a loss spike to the next ordinary step; one that is left out moves no
        weight, and so changes nothing. Checkpoints say so."""
        self._losses: dict[str, deque[float]] = {}
        self._skips_in_a_row = 0
        self._rollbacks = 0

    def judge(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        reports: Sequence[LossReport],
        totals: LossTotals,
        *,
        has_finite_gradient: bool,
    ) -> Anomaly | None:
        """What is wrong with a step, and what to do; None for an ordinary one. Every rank must call it.

        Args:
            step: the number of the step.
            batches: this rank's micro-batches.
            reports: of them, on the last pipeline stage.
            totals: the losses over all ranks.
            has_finite_gradient: of this rank (`TrainingEngine.has_finite_gradient`).

        Raises:
            DivergedError: the policy or a limit says stop.
        """
        sums = [[float(loss.loss_sum) for loss in report.losses.values()] for report in reports]
        bad = [i for i, values in enumerate(sums) if not all(map(math.isfinite, values))]
        spikes = self._spikes(totals.loss_per_task)
        is_bad = bool(bad) or not has_finite_gradient or not math.isfinite(float(totals.all_tasks.loss_sum))
        flags = torch.tensor([is_bad, bool(spikes)], dtype=torch.int32, device=self.context.device)
        if self.context.world_size > 1:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        any_bad, any_spike = map(bool, flags.tolist())
        if any_bad:
            text = self._where_not_finite(batches, bad, has_finite_gradient)
            return self._act(step, "not_finite", self.config.not_finite, text)
        self._remember(totals.loss_per_task)
        if any_spike:
            task = next(iter(spikes), "")
            text = f"{spikes.get(task, 'the loss jumped')}; {self._highest_loss(batches, reports)}"
            return self._act(step, "spike", self.config.spike, text)
        return None

    def settle(self, step: int, grad_norm: float, anomaly: Anomaly | None) -> Anomaly | None:
        """After the update: the anomaly, if any. Nothing moved where the norm over all ranks is not finite.

        Args:
            step: the number of the step.
            grad_norm: over all ranks, and so alike on every rank.
            anomaly: what `judge` said of the step.

        Raises:
            DivergedError: the policy or a limit says stop.
        """
        if math.isfinite(grad_norm):
            self.is_healthy, self._skips_in_a_row = anomaly is None, 0
            return anomaly
        text = "the gradient of every rank is finite, but not the norm over all of them"
        return self._act(step, "not_finite", self.config.not_finite, text)

    def skip_instead(self, anomaly: Anomaly) -> Anomaly:
        """What becomes of a rollback where there is no healthy checkpoint yet.

        Raises:
            DivergedError: too many updates in a row were left out.
        """
        self._rollbacks -= 1
        text = f"{anomaly.text}; there is no healthy checkpoint yet to go back to"
        return self._act(anomaly.step, anomaly.kind, "skip", text)

    def _act(self, step: int, kind: Kind, policy: Policy, text: str) -> Anomaly:
        """The anomaly with what the policy says, counted against the limits.

        Raises:
            DivergedError: it says stop, or a limit is used up.
        """
        seen = f"step {step}: {text}"
        remedy = "look at these samples, or lower optimizer.lr; the newest healthy checkpoint is intact"
        if policy == "stop":
            raise DivergedError(f"{seen}. anomaly.{kind}=stop ends the run: {remedy}")
        if policy == "skip":
            self._skips_in_a_row += 1
            if self._skips_in_a_row > self.config.max_skips:
                raise DivergedError(
                    f"{seen}. The updates of {self.config.max_skips} steps in a row were left out already "
                    f"(anomaly.max_skips): {remedy}"
                )
        elif policy == "rollback":
            self._rollbacks += 1
            if self._rollbacks > self.config.max_rollbacks:
                raise DivergedError(
                    f"{seen}. The run went back {self.config.max_rollbacks} times already (anomaly.max_rollbacks): "
                    f"{remedy}"
                )
        return Anomaly(step=step, kind=kind, action=policy, text=text)

    def _spikes(self, loss_per_task: dict[str, float]) -> dict[str, str]:
        """Task -> sentence, for tasks whose loss is far above its median."""
        found = {}
        for task, loss in loss_per_task.items():
            before = self._losses.get(task, deque())
            if len(before) < MIN_STEPS:
                continue
            median = statistics.median(before)
            if loss > max(self.config.spike_factor * median, median + MIN_JUMP):
                found[task] = (
                    f"the loss of {task} is {loss:.4f}, the median of its last {len(before)} steps {median:.4f} "
                    f"(anomaly.spike_factor={self.config.spike_factor:g})"
                )
        return found

    def _remember(self, loss_per_task: dict[str, float]) -> None:
        # A loss that stays high is the usual one some 25 steps later: nothing is held against a run for ever.
        for task, loss in loss_per_task.items():
            self._losses.setdefault(task, deque(maxlen=WINDOW)).append(loss)

    def _where_not_finite(self, batches: Sequence[MicroBatch], bad: Sequence[int], has_finite_gradient: bool) -> str:
        """Rank, micro-batch and samples of the losses that are not finite; without one, of the gradients."""
        names = [name for batch in batches for name in batch.sample_ids]
        every = self._gather([_place(batches, i) for i in bad], None if has_finite_gradient else _named(names))
        places = [f"on rank {note.rank}, {place}" for note in _one_per_replica(every) for place in note.places]
        if places:
            return f"the loss is not finite {_listed(places)}"
        notes = [note for note in every if note.samples is not None]
        if not notes:
            return "the sum of all losses is not finite, though every loss is"
        ranks = _listed([str(note.rank) for note in notes])
        return f"every loss is finite, but not the gradient of rank {ranks}; its micro-batches hold {notes[0].samples}"

    def _highest_loss(self, batches: Sequence[MicroBatch], reports: Sequence[LossReport]) -> str:
        """The micro-batch with the highest mean loss."""
        means = [max((loss.mean for loss in report.losses.values()), default=-math.inf) for report in reports]
        worst = max(range(len(means)), key=means.__getitem__, default=None)
        place = [] if worst is None else [_place(batches, worst)]
        every = self._gather(place, None, -math.inf if worst is None else means[worst])
        note = max((note for note in every if note.places), key=lambda note: note.loss)
        return f"highest on rank {note.rank}, {note.places[0]}, at {note.loss:.4f}"

    def _gather(self, places: list[str], samples: str | None, loss: float = 0.0) -> list[_Note]:
        """Every rank's note, in the order of ranks; every rank must call it."""
        mine = _Note(self.context.rank, self.context.dp_rank, places, samples, loss)
        if self.context.world_size == 1:
            return [mine]
        notes: list[Any] = [None] * self.context.world_size
        torch.distributed.all_gather_object(notes, mine)
        return notes


class _Note(NamedTuple):
    """What one rank saw."""

    rank: int
    replica: int
    places: list[str]
    samples: str | None
    loss: float


def _one_per_replica(notes: Sequence[_Note]) -> list[_Note]:
    """Tensor- and context-parallel ranks share their micro-batches: the first that has seen something speaks."""
    first: dict[int, _Note] = {}
    for note in notes:
        if note.places:
            first.setdefault(note.replica, note)
    return list(first.values())


def _place(batches: Sequence[MicroBatch], number: int) -> str:
    return f"micro-batch {number + 1} of {len(batches)} ({_named(batches[number].sample_ids)})"


def _named(sample_ids: Sequence[str]) -> str:
    return f"{'samples' if len(sample_ids) > 1 else 'sample'} {_listed(sample_ids)}"


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - _MAX_NAMED
    return ", ".join(texts[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
