"""What the trainer tells its hooks, and the base class they share.

Steps are counted from 1: `TrainState.step` is the number of optimizer steps completed, so a run resumed from
`step_00000100` starts with `state.step == 100` and its first record has `record.step == 101`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from megatron_hgpt.checkpoint import SavedCheckpoint
    from megatron_hgpt.config import RunConfig
    from megatron_hgpt.model.healthgpt import HealthGPT


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Where a run stands; hooks read it and never write to it."""

    step: int
    """Optimizer steps completed, those before a resume included."""
    total_steps: int
    """Optimizer steps of the whole stage."""
    stage: str
    """A row of the stage table, e.g. ``stage3_joint``."""
    output_dir: Path
    is_writer: bool
    """True on exactly one rank of the whole job: the one that writes files and the console."""
    config: RunConfig
    model: HealthGPT
    """The trained module, for hooks that look into it."""
    sample_counts: dict[str, int] = field(default_factory=dict)
    """Samples that were truncated, and skipped by reason (``skipped/<reason>``), over all ranks since this process
    started; known at `on_fit_end` only."""

    def is_due(self, interval_steps: int) -> bool:
        """Whether a record every `interval_steps` steps falls on this step; the first and last always do."""
        return self.step % max(interval_steps, 1) == 0 or self.step in (1, self.total_steps)


class Phase(StrEnum):
    """What a rank is doing, in the order of a step."""

    START = "starting"
    LOAD = "loading data"
    COMPUTE = "forward and backward"
    UPDATE = "the optimizer's update"
    REPORT = "records and hooks"
    SAVE = "saving a checkpoint"
    VALIDATE = "validating"
    END = "ending"

    @property
    def order(self) -> int:
        """Place in a step, from 0."""
        return list(Phase).index(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Anomaly:
    """A step whose loss or gradient is not finite, or whose loss jumped; alike on every rank."""

    step: int
    kind: Literal["not_finite", "spike"]
    action: Literal["warn", "skip", "rollback"]
    """warn: the update was made all the same; skip: it was left out; rollback: left out, and back to a checkpoint."""
    text: str
    """What was seen, where, and on which samples: one sentence."""
    back_to_step: int | None = None
    """Of a rollback: the step of the checkpoint that training went back to."""


@dataclass(kw_only=True, slots=True)
class StepRecord:
    """One optimizer step; counts and losses are over all ranks."""

    step: int
    """1 for the first optimizer step of the stage."""
    loss: float
    """Mean cross-entropy over the supervised tokens of the global batch, in nats."""
    loss_per_task: dict[str, float]
    """The same over one task's tokens; tasks without samples in this step are left out."""
    num_supervised_tokens: int
    num_tokens: int
    """Content tokens that went through the model, image features included, padding excluded."""
    num_samples: int
    padding_share: float
    """Share of the positions that went through the model and hold padding, 0 … 1."""
    learning_rates: dict[str, float]
    """Parameter group -> learning rate used in this step; ``default`` and ``adapter``."""
    grad_norm: float
    """Global gradient norm before clipping."""
    step_time_s: float
    tokens_per_s: float
    """num_tokens / step_time_s."""
    anomaly: Anomaly | None = None


@dataclass(kw_only=True, slots=True)
class ValidationRecord:
    """The held-out samples after an optimizer step; losses and counts are over all ranks."""

    step: int
    loss: float
    """Mean cross-entropy over the supervised tokens of all samples, in nats."""
    loss_per_task: dict[str, float]
    """The same over one task's tokens; tasks without samples are left out."""
    num_samples_per_task: dict[str, int]
    num_tokens: int
    """Supervised tokens."""
    time_s: float


class Hook:
    """A side effect of training; every method does nothing unless overridden, and runs on every rank."""

    def on_fit_start(self, state: TrainState) -> None:
        """Before the first step, after a checkpoint was loaded."""

    def on_phase(self, state: TrainState, phase: Phase) -> None:
        """When this rank begins another part of its work; several times a step, so it must be quick."""

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """After each optimizer step; `state.step == record.step`. Not after one that was rolled back."""

    def on_anomaly(self, state: TrainState, anomaly: Anomaly) -> None:
        """Before the `on_step_end` of an abnormal step; after a rollback, with `state.step` where training goes on."""

    def on_validation_start(self, state: TrainState) -> None:
        """Before the held-out samples are run."""

    def on_validation(self, state: TrainState, record: ValidationRecord) -> None:
        """After them; `state.step == record.step`."""

    def on_checkpoint_saved(self, state: TrainState, checkpoint: SavedCheckpoint) -> None:
        """After a checkpoint is complete."""

    def on_fit_end(self, state: TrainState) -> None:
        """After the last step and its checkpoint."""

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """When the run stops with an error, instead of `on_fit_end`; must not communicate with other ranks."""
