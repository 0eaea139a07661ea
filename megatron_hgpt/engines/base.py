"""What the trainer and the checkpointer need of an engine.

Both engines keep one contract: the gradient of a step is the sum over the supervised tokens of the global batch,
divided by their number; its norm is taken before clipping; parameter groups marked ``idle`` do not move.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_hgpt.forward_step import LossReport
from megatron_hgpt.samples import MicroBatch

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "main"
"""The fp32 copy of a bf16 parameter, which training continues from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatePart:
    """What one rank holds of one tensor of the optimizer's state: a range of the flattened parameter."""

    start: int
    """First element, counted in this rank's parameter, flattened."""
    tensor: torch.Tensor
    """[n], the elements from `start` on; what is written into it counts in the next step."""


class OptimizerState(Protocol):
    """AdamW's state by parameter name, as far as this rank holds it: one form for every engine.

    A checkpoint is written from the ranges that ranks hold and read into them, so that no rank ever has more.
    """

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups, which hold the name (``group``) and the step count (``step``)."""

    @property
    def is_split(self) -> bool:
        """Whether data-parallel ranks hold different ranges (ZeRO); otherwise each holds all, alike."""

    def parts(self) -> dict[str, dict[str, StatePart]]:
        """Parameter name -> exp_avg, exp_avg_sq, and main of a bf16 parameter -> what this rank holds.

        A parameter of which other ranks hold everything has no slots.
        """

    def restored(self) -> None:
        """Told once parameters and `parts` are read from a checkpoint: renew what was copied from them."""


class TrainingEngine(Protocol):
    """Forward, backward and optimizer step of one model."""

    optimizer: Any
    """Holds ``param_groups``, one per group of the stage; learning rates and ``idle`` are set there between
    `accumulate` and `step`."""

    @property
    def has_finite_gradient(self) -> bool:
        """Whether the gradient of this rank's own micro-batches was finite in the last `accumulate`, before it was
        added to those of other ranks. Where it was not on any rank, `step` must not be called on any.
        """

    def accumulate(self, batches: Sequence[MicroBatch]) -> list[LossReport]:
        """Forward and backward of this rank's micro-batches; afterwards the step's gradient is complete.

        A gradient that no `step` took is forgotten, whyever the step was left out.

        Returns:
            One report per micro-batch, in their order, on the last pipeline stage; nothing on the others.
        """

    def evaluate(self, batches: Sequence[MicroBatch]) -> list[LossReport]:
        """Forward only, without dropout: weights, gradients and random states stay as they are.

        Every rank calls it with the same number of micro-batches: pipeline stages hand hidden states on, and ZeRO-3
        gathers weights together. Under the interleaved schedule it is a multiple of the pipeline stages.

        Returns:
            One report per micro-batch, in their order, on the last pipeline stage; nothing on the others.
        """

    def step(self) -> float:
        """Clip and update; returns the global gradient norm before clipping.

        Megatron's engine moves nothing where that norm is not finite, on every rank alike.
        """

    def whole_parameters(self, *, writable: bool = False) -> AbstractContextManager[None]:
        """Inside, every parameter has its true shape, and those that checkpoints hold have their values.

        Args:
            writable: values written inside are kept; every rank must write the same.
        """

    def optimizer_state(self) -> OptimizerState:
        """The state, with moments of zero where no step was taken yet."""
