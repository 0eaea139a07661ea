"""DeepSpeed's engine: ZeRO 1, 2 and 3 over data-parallel ranks, with the losses of Megatron's engine.

The ranks of one step run micro-batches of different tasks, so they use different adapters and plugins. ZeRO reduces
gradients, and at stage 3 gathers weights, by collectives in the order in which modules run: ranks in different order
would mix tensors up or wait for ever. Three things keep the order alike everywhere:

1. Gradients stay on their rank while the micro-batches run, summed in fp32; DeepSpeed reduces them once per step, in
   the order of its parameter groups, with zeros where a rank had no sample of a task (`coalesce_grad_reduction`).
2. Stage 3 gathers adapters and plugins where the model's forward and backward begin, on every rank, whatever its task:
   they are external parameters of the model, and the modules that own them get no hooks (they are "leaf modules").
3. DeepSpeed never sees the vision tower. It is frozen, and only ranks with an image run it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_hgpt.config import RunConfig
from megatron_hgpt.distributed import DistributedContext
from megatron_hgpt.engines.base import MAIN, MOMENTS, OptimizerState, StatePart
from megatron_hgpt.engines.deepspeed_settings import deepspeed_json
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.forward_step import LossReport, forward_step
from megatron_hgpt.optim import build_adamw, group_fields
from megatron_hgpt.parameters import group_of, parameter_group
from megatron_hgpt.samples import MicroBatch
from megatron_hgpt.stages import Stage

if TYPE_CHECKING:
    from megatron_hgpt.model.healthgpt import HealthGPT


class DeepSpeedEngine:
    """`TrainingEngine` on DeepSpeed.

    Args:
        config: the run.
        stage: decides the parameter groups.
        context: this process's place; the process group exists already and is used as it is.
        model: the bare model, already frozen except for the stage's groups.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
    """

    def __init__(self, config: RunConfig, stage: Stage, context: DistributedContext, model: HealthGPT) -> None:
        self.model, self.context = model, context
        self._is_sharded = config.engine.zero_stage == 3
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._sums: dict[str, torch.Tensor] = {}
        self.has_finite_gradient = True
        _hide_tower(model)
        adam = build_adamw(config, _parameter_groups(config, stage, self._trained))
        if self._is_sharded:
            _mark_task_modules(model)
        self._engine = _initialize(model, adam, deepspeed_json(config))
        if self._is_sharded:
            _gather_task_parameters_at_the_root(model)
        self.optimizer = self._engine.optimizer
        self._first_micro_step = self.optimizer.micro_step_id
        self._is_step_due = False
        _zero_moments(self.optimizer)

    def accumulate(self, batches: Sequence[MicroBatch]) -> list[LossReport]:
        """See `TrainingEngine.accumulate`."""
        self._engine.train()
        if self._is_step_due:
            self._forget_gradient()
        self._is_step_due = True
        with self._engine.coalesce_grad_reduction():
            try:
                reports, num_tokens, is_finite = self._run(batches)
                if is_finite:
                    # DeepSpeed averages over ranks; the gradient is a sum over ranks, per token of the global batch.
                    self._hand_over_gradients(self.context.dp_size / max(num_tokens, 1))
                else:  # on every rank: there is nothing that leaving the block could reduce, or `step` take
                    self._sums.clear()
            except BaseException:
                # Leaving the block reduces whatever has a gradient, and the peers may never join that.
                self._engine.zero_grad()
                self._sums.clear()
                raise
        return reports

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> list[LossReport]:
        """See `TrainingEngine.evaluate`."""
        self._engine.eval()  # `accumulate` turns it back
        source = iter(batches)
        reports: list[LossReport] = []
        for _ in batches:
            losses, reduce = forward_step(source, self._engine)
            reports.append(reduce(losses)[-1])
        return reports

    def step(self) -> float:
        """See `TrainingEngine.step`."""
        self._engine.step()
        self._is_step_due = False
        return float(self._engine.get_global_grad_norm())

    @contextlib.contextmanager
    def whole_parameters(self, *, writable: bool = False) -> Iterator[None]:
        """See `TrainingEngine.whole_parameters`: stage 3 gathers what checkpoints hold, of the rest the shape."""
        if not self._is_sharded:
            yield
            return
        import deepspeed

        backbone = [p for name, p in self.model.named_parameters() if group_of(name) == "backbone"]
        held = [p.data for p in backbone]
        saved = [p for name, p in self.model.named_parameters() if group_of(name) != "backbone"]
        with deepspeed.zero.GatheredParameters(saved, modifier_rank=0 if writable else None):
            for p in backbone:
                p.data = p.data.new_empty(1).expand(p.ds_shape)  # the shape without the memory
            try:
                yield
            finally:
                for p, data in zip(backbone, held, strict=True):
                    p.data = data

    def optimizer_state(self) -> OptimizerState:
        """See `TrainingEngine.optimizer_state`."""
        return DeepSpeedOptimizerState(self.optimizer, self._trained)

    def _run(self, batches: Sequence[MicroBatch]) -> tuple[list[LossReport], int, bool]:
        """Forward and backward of all micro-batches.

        Returns:
            Reports, supervised tokens of the global batch, and whether the gradients of all ranks are finite.
        """
        source = iter(batches)
        reports: list[LossReport] = []
        # Supervised tokens, and ranks whose gradient is not finite: counts, exact in fp64.
        counts = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        for _ in batches:
            losses, reduce = forward_step(source, self._engine)
            loss_sum, num_tokens, report = reduce(losses)
            self._engine.backward(loss_sum)
            self._collect_gradients()
            counts[0] += num_tokens
            reports.append(report)
        norms = [torch.linalg.vector_norm(total) for total in self._sums.values()]
        self.has_finite_gradient = not norms or bool(torch.isfinite(torch.stack(norms)).all())
        counts[1] = not self.has_finite_gradient
        torch.distributed.all_reduce(counts)
        return reports, int(counts[0]), not counts[1]

    def _forget_gradient(self) -> None:
        """Begin as after a step: the last one was left out, and DeepSpeed would add the next gradient to its own."""
        self.optimizer.zero_grad()
        self.optimizer.averaged_gradients.clear()
        self.optimizer.micro_step_id = self._first_micro_step

    def _collect_gradients(self) -> None:
        """Add this micro-batch's gradients to the fp32 sums and free them."""
        for name, parameter in self._trained.items():
            if parameter.grad is None:
                continue
            if name in self._sums:
                self._sums[name] += parameter.grad
            else:
                self._sums[name] = parameter.grad.float()
            parameter.grad = None

    def _hand_over_gradients(self, scale: float) -> None:
        """Give DeepSpeed the gradient of every trained parameter, zeros included: it skips what has none."""
        import deepspeed

        # A gradient must have its parameter's shape, which a sharded one has while it is gathered.
        with deepspeed.zero.GatheredParameters(list(self._trained.values()), enabled=self._is_sharded):
            for name, parameter in self._trained.items():
                total = self._sums.pop(name, None)
                if total is None:
                    parameter.grad = torch.zeros_like(parameter)
                else:
                    parameter.grad = total.mul_(scale).to(parameter.dtype)


class DeepSpeedOptimizerState:
    """`OptimizerState` of a ZeRO optimizer, whose flat shards DeepSpeed maps to parameters."""

    def __init__(self, optimizer: Any, trained: Mapping[str, torch.nn.Parameter]) -> None:
        self._optimizer, self._trained = optimizer, trained

    @property
    def groups(self) -> list[dict[str, Any]]:
        """See `OptimizerState.groups`."""
        return self._optimizer.param_groups

    is_split = True
    """See `OptimizerState.is_split`."""

    def parts(self) -> dict[str, dict[str, StatePart]]:
        """See `OptimizerState.parts`."""
        result: dict[str, dict[str, StatePart]] = {}
        for name, parameter in self._trained.items():
            slots = (*MOMENTS, *([MAIN] if parameter.dtype != torch.float32 else []))
            parts = {slot: self._part(parameter, slot) for slot in slots}
            result[name] = {slot: part for slot, part in parts.items() if part is not None}
        return result

    @torch.no_grad()
    def restored(self) -> None:
        """See `OptimizerState.restored`: ZeRO steps from its own fp32 shards at every precision."""
        for parameter in self._trained.values():
            part = self._part(parameter, MAIN) if parameter.dtype == torch.float32 else None
            if part is not None:
                part.tensor.copy_(parameter.data.view(-1)[part.start : part.start + part.tensor.numel()])

    def _part(self, parameter: Any, slot: str) -> StatePart | None:
        """This rank's range of a slot, as a view; None where other ranks hold all of it."""
        key = None if slot == MAIN else slot
        if hasattr(parameter, "ds_id"):  # stage 3: equal ranges, the last ones padded
            start = parameter.partition_numel() * parameter.ds_zero_partition_rank
            count = min(parameter.partition_numel(), parameter.ds_numel - start)
            if count <= 0:
                return None
            held, _ = self._optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )
            return StatePart(start=start, tensor=held[:count])
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        return StatePart(start=mapping.lp_fragment_address.start, tensor=mapping.get_hp_fragment(key))


def _initialize(model: HealthGPT, adam: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """DeepSpeed's engine in the process group that exists.

    Raises:
        ConfigError: DeepSpeed refuses the settings.
    """
    import deepspeed
    from pydantic import ValidationError

    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.ERROR)  # some fifty lines at every start, and a warning that the optimizer is not DeepSpeed's
    # A kernel for collectives in shared memory, which needs a compiler and minutes at the first start; gloo does them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        torch.distributed.get_backend(), auto_mpi_discovery=False, dist_init_required=False, verbose=False
    )
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings, dist_init_required=False)
    except (ValidationError, deepspeed.DeepSpeedConfigError) as error:
        raise ConfigError(f"engine.overrides: DeepSpeed refuses them: {' '.join(str(error).split())}") from error
    log.setLevel(logging.WARNING)
    return engine


def _parameter_groups(
    config: RunConfig, stage: Stage, trained: Mapping[str, torch.nn.Parameter]
) -> list[dict[str, Any]]:
    groups = []
    for group, fields in group_fields(config, stage).items():
        groups.append(
            {"params": [p for name, p in trained.items() if group_of(name) == parameter_group(group)], **fields}
        )
    return groups


def _zero_moments(optimizer: Any) -> None:
    """Moments of zero for every shard, so that a state can be read and restored before the first step."""
    sharded = hasattr(optimizer, "fp32_partitioned_groups_flat")
    shards = optimizer.fp32_partitioned_groups_flat if sharded else optimizer.single_partition_of_fp32_groups
    for shard in shards:
        optimizer.optimizer.state[shard] = {slot: torch.zeros_like(shard.data) for slot in MOMENTS}
    if not sharded:
        optimizer._lazy_init_hp_params_optimizer_state()


def _hide_tower(model: HealthGPT) -> None:
    """Keep the tower usable as `model.tower`, but no longer one of the model's modules."""
    tower = model.tower
    del model.tower
    object.__setattr__(model, "tower", tower)


def _task_modules(model: HealthGPT) -> Iterator[torch.nn.Module]:
    """The containers of adapters and plugins: what runs depends on the micro-batch's task."""
    from megatron_hgpt.hlora.linear import HLoRALinearMixin

    yield model.adapters
    yield from (module.hlora for module in model.modules() if isinstance(module, HLoRALinearMixin))


def _mark_task_modules(model: HealthGPT) -> None:
    from deepspeed.utils import set_z3_leaf_module

    for container in _task_modules(model):
        set_z3_leaf_module(container, True)


def _gather_task_parameters_at_the_root(model: HealthGPT) -> None:
    import deepspeed

    for container in _task_modules(model):
        for parameter in container.parameters():
            deepspeed.zero.register_external_parameter(model, parameter)
