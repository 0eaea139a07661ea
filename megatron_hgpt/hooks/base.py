"""What the trainer tells its hooks, and the base class they share.

Steps are counted from 1: `TrainState.step` is the number of optimizer steps completed, so a run resumed from
`step_00000100` starts with `state.step == 100` and its first record has `record.step == 101`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

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

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """After each optimizer step; `state.step == record.step`."""

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
