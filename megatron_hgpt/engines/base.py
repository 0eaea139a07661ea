"""What the trainer and the checkpointer need of an engine.

Both engines keep one contract: the gradient of a step is the sum over the supervised tokens of the global batch,
divided by their number; its norm is taken before clipping; parameter groups marked ``idle`` do not move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from megatron_hgpt.forward_step import LossReport
from megatron_hgpt.samples import MicroBatch

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "main"
"""The fp32 copy of a bf16 parameter, which training continues from."""


class OptimizerState(Protocol):
    """AdamW's state as whole tensors by parameter name: one form for every engine, so that each resumes the other's."""

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups, which hold the name (``group``) and the step count (``step``)."""

    def gather(self) -> dict[str, dict[str, torch.Tensor]]:
        """Parameter name -> exp_avg, exp_avg_sq, and main of a bf16 parameter; every rank must call it."""

    def scatter(self, whole: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Copy whole tensors into what this rank holds of them; the model's own tensors are restored before."""


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
