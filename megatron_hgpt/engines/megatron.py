"""Megatron-Core's engine: its DDP, pipeline schedule and optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_hgpt.config import RunConfig
from megatron_hgpt.data.samples import MicroBatch
from megatron_hgpt.engines.base import MAIN, MOMENTS, OptimizerState
from megatron_hgpt.forward_step import LossReport, forward_step
from megatron_hgpt.optim import build_optimizer
from megatron_hgpt.stages import Stage


class MegatronEngine:
    """`TrainingEngine` on megatron.core.

    Args:
        config: the run.
        stage: decides the parameter groups.
        model: the bare model, already frozen except for the stage's groups.
    """

    def __init__(self, config: RunConfig, stage: Stage, model: Any) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        self.config, self.model = config, model
        transformer = model.config
        self.ddp = DistributedDataParallel(
            transformer,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                # The overlapped reduction asserts that every parameter reports, which idle plugins do not.
                overlap_grad_reduce=False,
                use_distributed_optimizer=config.parallel.use_distributed_optimizer,
                check_for_nan_in_grad=True,
            ),
            model,
        )
        self.optimizer = build_optimizer(config, stage, [self.ddp])
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.no_sync_func = self.ddp.no_sync
        transformer.grad_scale_func = self.optimizer.scale_loss

    def accumulate(self, batches: Sequence[MicroBatch]) -> list[LossReport]:
        """See `TrainingEngine.accumulate`."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.ddp],
            num_microbatches=len(batches),
            seq_length=self.config.model.max_seq_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=False,
        )

    def step(self) -> float:
        """See `TrainingEngine.step`."""
        _, grad_norm, _ = self.optimizer.step()
        return float(self.optimizer.get_grad_norm() if grad_norm is None else grad_norm)

    def whole_parameters(self, *, writable: bool = False) -> contextlib.AbstractContextManager[None]:
        """See `TrainingEngine.whole_parameters`: they always are."""
        return contextlib.nullcontext()

    def optimizer_state(self) -> OptimizerState:
        """See `TrainingEngine.optimizer_state`."""
        return MegatronOptimizerState(self.optimizer, dict(self.model.named_parameters()))


class MegatronOptimizerState:
    """`OptimizerState` of Megatron's optimizer, which keeps the moments beside each parameter or its fp32 copy."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._trained = {name: p for name, p in parameters.items() if p.requires_grad}
        chained = getattr(optimizer, "chained_optimizers", [optimizer])
        self._inner = [one for one in chained if not getattr(one, "is_stub_optimizer", False)]
        for one in self._inner:
            one.init_state_fn(one.optimizer, one.config)
        self._owner = {
            id(p): one for one in self._inner for group in one.optimizer.param_groups for p in group["params"]
        }

    @property
    def groups(self) -> list[dict[str, Any]]:
        """See `OptimizerState.groups`."""
        return [group for one in self._inner for group in one.optimizer.param_groups]

    def gather(self) -> dict[str, dict[str, torch.Tensor]]:
        """See `OptimizerState.gather`: the tensors that the optimizer itself holds."""
        result = {}
        for name, parameter in self._trained.items():
            main = getattr(parameter, "main_param", None)
            key = parameter if main is None else main
            state = self._owner[id(key)].optimizer.state[key]
            result[name] = {slot: state[slot] for slot in MOMENTS}
            if main is not None:
                result[name][MAIN] = main
        return result

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """See `OptimizerState.scatter`."""
        for name, held in self.gather().items():
            for slot, tensor in held.items():
                if tensor is not whole[name][slot]:
                    tensor.copy_(whole[name][slot])
