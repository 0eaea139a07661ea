"""Megatron-Core's engine: its DDP, pipeline schedule and optimizer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_hgpt.config import RunConfig
from megatron_hgpt.engines.base import OptimizerState
from megatron_hgpt.engines.megatron_state import MegatronOptimizerState
from megatron_hgpt.forward_step import LossReport, forward_step
from megatron_hgpt.optim import build_optimizer
from megatron_hgpt.samples import MicroBatch
from megatron_hgpt.stages import Stage

if TYPE_CHECKING:
    from megatron_hgpt.model.healthgpt import HealthGPT


class MegatronEngine:
    """`TrainingEngine` on megatron.core.

    Args:
        config: the run.
        stage: decides the parameter groups.
        models: the bare model, or its interleaved chunks, already frozen except for the stage's groups.
    """

    def __init__(self, config: RunConfig, stage: Stage, models: Sequence[HealthGPT]) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        self.config, self.models = config, list(models)
        transformer = self.models[0].config
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            # The overlapped reduction asserts that every parameter reports, which idle plugins do not.
            overlap_grad_reduce=False,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            check_for_nan_in_grad=False,  # it raises on one rank and leaves the others in the reduction
        )
        self.ddp = [DistributedDataParallel(transformer, ddp_config, model) for model in self.models]
        self.optimizer = build_optimizer(config, stage, self.ddp)
        self._own_norm = torch.zeros(())
        transformer.finalize_model_grads_func = self._finalize
        no_sync = [ddp.no_sync for ddp in self.ddp]
        transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        transformer.grad_scale_func = self.optimizer.scale_loss

    @property
    def has_finite_gradient(self) -> bool:
        """See `TrainingEngine.has_finite_gradient`."""
        return math.isfinite(float(self._own_norm))

    def accumulate(self, batches: Sequence[MicroBatch]) -> list[LossReport]:
        """See `TrainingEngine.accumulate`."""
        for ddp in self.ddp:
            ddp.train()
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> list[LossReport]:
        """See `TrainingEngine.evaluate`."""
        for ddp in self.ddp:
            ddp.eval()  # `accumulate` turns it back
        return self._run(batches, forward_only=True)

    def _run(self, batches: Sequence[MicroBatch], *, forward_only: bool) -> list[LossReport]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        # Each interleaved chunk reads the same micro-batches, at its own pace.
        iterators = [iter(batches) for _ in self.ddp]
        reports: list[LossReport] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.ddp,
            num_microbatches=len(batches),
            seq_length=self.config.model.max_seq_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
        )
        return reports

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's reductions over ranks, after the norm of what this rank adds to them is taken."""
        from megatron.core.distributed import finalize_model_grads

        norms = [torch.linalg.vector_norm(buffer.grad_data) for ddp in self.ddp for buffer in ddp.buffers]
        self._own_norm = torch.stack(norms).sum() if norms else torch.zeros(())
        finalize_model_grads(*args, **kwargs)

    def step(self) -> float:
        """See `TrainingEngine.step`; the norm is taken before anything moves, and once more by Megatron to clip."""
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if math.isfinite(grad_norm):
            self.optimizer.step()
        return grad_norm

    def whole_parameters(self, *, writable: bool = False) -> contextlib.AbstractContextManager[None]:
        """See `TrainingEngine.whole_parameters`: they always are."""
        return contextlib.nullcontext()

    def optimizer_state(self) -> OptimizerState:
        """See `TrainingEngine.optimizer_state`."""
        from megatron_hgpt.parameters import named_parameters

        return MegatronOptimizerState(self.optimizer, named_parameters(self.models))
