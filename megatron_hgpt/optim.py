"""AdamW over a stage's parameter groups through megatron.core's optimizer, and the learning-rate schedule.

Two things differ from megatron.core's default. The step count lives in the parameter group (as the fused Adams keep
it), which torch's Adam does not do; and a group whose task had no sample in this step is left alone: no moment decay,
no step count, no change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.adamw import adamw

from megatron_hgpt.backbone.implementation import keeps_bf16_parameters
from megatron_hgpt.config import OptimizerConfig, RunConfig
from megatron_hgpt.parameters import GROUP_TASK, group_of, parameter_group
from megatron_hgpt.stages import Stage

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from torch.optim.optimizer import ParamsT


class GroupStepAdamW(torch.optim.AdamW):
    """torch's AdamW arithmetic with the step count kept per parameter group.

    Args:
        params: parameter groups.
        lr: learning rate; the scheduler rewrites it per group.
        betas, eps, weight_decay: as torch.optim.AdamW.
        adam_w_mode: accepted for the signature of the fused Adams; only True (decoupled decay) is implemented.
        state_device: where the moments live and the update runs; None is beside each parameter.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        state_device: torch.device | None = None,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("GroupStepAdamW implements decoupled weight decay only (adam_w_mode=True)")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.state_device = state_device
        for group in self.param_groups:
            group["step"] = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's: AdamW's own expects a step count per parameter."""
        torch.optim.Optimizer.__setstate__(self, state)

    def init_state(self) -> None:
        """Zero moments for parameters that have none yet."""
        for group in self.param_groups:
            self._init_state_of(group["params"])

    def _init_state_of(self, params: list[torch.Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                device = self.state_device or p.device
                self.state[p] = {
                    name: torch.zeros_like(p, device=device, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One AdamW step of every group that has gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            self._init_state_of(params)
            group["step"] += 1
            values, grads = params, [p.grad for p in params]
            if self.state_device is not None:
                values, grads = [p.to(self.state_device) for p in params], [g.to(self.state_device) for g in grads]
            adamw(
                values,
                grads,
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # The functional form advances each count itself before using it.
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                foreach=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            if self.state_device is not None:
                for p, value in zip(params, values, strict=True):
                    p.copy_(value)


class _HostAdamW(GroupStepAdamW):
    def __init__(self, params: ParamsT, **kwargs: Any) -> None:
        super().__init__(params, **{**kwargs, "state_device": torch.device("cpu")})


def _idle_aware(adam: type) -> type:
    """`adam` with a `step` that skips the groups marked idle."""

    class IdleAwareAdam(adam):  # type: ignore[misc,valid-type]
        def step(self, *args: Any, **kwargs: Any) -> object:
            every_group = self.param_groups  # type: ignore[has-type]
            self.param_groups = [group for group in every_group if not group.get("idle", False)]
            try:
                return super().step(*args, **kwargs)
            finally:
                self.param_groups = every_group

    return IdleAwareAdam


@contextlib.contextmanager
def _adam_for_megatron(offload: bool = False) -> Iterator[None]:
    """Have get_megatron_optimizer build our Adam: the fused one where Transformer Engine or Apex provide it.

    Args:
        offload: moments and update in host memory.
    """
    import megatron.core.optimizer as megatron_optimizer

    adam, is_torch = megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER
    if offload:
        megatron_optimizer.Adam = _idle_aware(_HostAdamW)
    else:
        megatron_optimizer.Adam = _idle_aware(GroupStepAdamW if is_torch else adam)
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    try:
        yield
    finally:
        megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = adam, is_torch


def megatron_optimizer_settings(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """Fields of Megatron's OptimizerConfig that our sections decide; `optimizer.megatron_overrides` may set others."""
    settings = config.optimizer
    base_lr = stage.lr if settings.lr is None else settings.lr
    return {
        "optimizer": "adam",
        "lr": base_lr,
        "min_lr": base_lr * settings.min_lr_ratio,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_eps": settings.adam_eps,
        "clip_grad": settings.clip_grad,
        "bf16": keeps_bf16_parameters(config.training),
        "params_dtype": torch.bfloat16 if keeps_bf16_parameters(config.training) else torch.float32,
        "use_distributed_optimizer": config.parallel.use_distributed_optimizer,
    }


def group_fields(config: RunConfig, stage: Stage) -> dict[str, dict[str, Any]]:
    """What the parameter group of each trained stage group carries: ``group``, ``max_lr`` and ``min_lr``."""
    settings, fields = config.optimizer, {}
    for group in stage.trainable:
        lr = stage.lr_of(group, settings.lr, settings.adapter_lr)
        fields[group] = {"group": group, "max_lr": lr, "min_lr": lr * settings.min_lr_ratio}
    return fields


def build_adamw(config: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW that leaves idle groups alone, for an engine that shards and clips by itself."""
    settings = config.optimizer
    return _idle_aware(GroupStepAdamW)(
        groups,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )


def build_optimizer(config: RunConfig, stage: Stage, model_chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Megatron's optimizer over the trainable parameters of DDP-wrapped `model_chunks`, one group per stage group.

    Each parameter group carries the fields of `group_fields`.
    """
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    settings: OptimizerConfig = config.optimizer
    overrides = {}
    for group, fields in group_fields(config, stage).items():
        matched = parameter_group(group)
        predicate = ParamWithNamePredicate(name=group, fn=lambda _param, name, wanted=matched: group_of(name) == wanted)
        overrides[ParamKey(with_name_predicate=predicate)] = fields
    megatron_config = MegatronOptimizerConfig(
        **megatron_optimizer_settings(config, stage), **settings.megatron_overrides
    )
    with _adam_for_megatron(settings.cpu_offload):
        return get_megatron_optimizer(
            megatron_config, model_chunks, config_overrides=overrides, use_gloo_process_groups=False
        )


def build_scheduler(
    config: RunConfig, stage: Stage, optimizer: MegatronOptimizer | torch.optim.Optimizer, total_steps: int
) -> OptimizerParamScheduler:
    """Megatron's scheduler: linear warm-up, then cosine, linear or constant; steps are optimizer steps."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    settings = config.optimizer
    ratio = stage.warmup_ratio if settings.warmup_ratio is None else settings.warmup_ratio
    base_lr = stage.lr if settings.lr is None else settings.lr
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=base_lr,
        min_lr=base_lr * settings.min_lr_ratio,
        lr_warmup_steps=min(round(ratio * total_steps), max(total_steps - 1, 0)),
        lr_decay_steps=total_steps,
        lr_decay_style=settings.schedule or stage.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )


def mark_idle_groups(optimizer: MegatronOptimizer | torch.optim.Optimizer, active_tasks: Collection[str]) -> None:
    """Mark the groups of tasks without samples in this step, on every rank alike, so that they do not move."""
    for group in optimizer.param_groups:
        task = GROUP_TASK.get(group.get("group", ""))
        group["idle"] = task is not None and task.value not in active_tasks


def learning_rates(optimizer: MegatronOptimizer | torch.optim.Optimizer) -> dict[str, float]:
    """Learning rates in use: ``adapter`` for adapter groups beside others, ``default`` for the rest."""
    rates = {group["group"]: float(group["lr"]) for group in optimizer.param_groups if "group" in group}
    adapters = {rate for name, rate in rates.items() if name.endswith("_adapter")}
    others = {rate for name, rate in rates.items() if not name.endswith("_adapter")}
    result = {"default": max(others or adapters, default=0.0)}
    if others and adapters:
        result["adapter"] = max(adapters)
    return result
