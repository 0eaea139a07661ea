from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hgpt import cpu_platform
from megatron_hgpt.config import RunConfig
from megatron_hgpt.optim import (
    GroupStepAdamW,
    _adam_for_megatron,
    _idle_aware,
    build_scheduler,
    learning_rates,
    mark_idle_groups,
)
from megatron_hgpt.samples import Task
from megatron_hgpt.stages import STAGES

SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(size, generator=generator, dtype=dtype)) for size in ((4, 3), (5,), ())]


def gradients(step: int, params: list[torch.nn.Parameter]) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return (torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_arithmetic_is_torch_s_adamw(dtype: torch.dtype, weight_decay: float) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    settings = {**SETTINGS, "weight_decay": weight_decay}
    mine, reference = GroupStepAdamW(ours, **settings), torch.optim.AdamW(theirs, foreach=True, **settings)
    for step in range(5):
        for optimizer, params in ((mine, ours), (reference, theirs)):
            for p, gradient in zip(params, gradients(step, params), strict=True):
                p.grad = gradient
            optimizer.step()
        # The same kernels on the same numbers: no tolerance.
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(mine.state[a]["exp_avg"], reference.state[b]["exp_avg"])
        assert torch.equal(mine.state[a]["exp_avg_sq"], reference.state[b]["exp_avg_sq"])


def test_the_count_is_the_group_s_and_continues_from_a_saved_one() -> None:
    whole, first = parameters(), parameters()
    straight, before = GroupStepAdamW(whole, **SETTINGS), GroupStepAdamW(first, **SETTINGS)
    assert straight.param_groups[0]["step"] == 0

    def advance(optimizer: GroupStepAdamW, params: list[torch.nn.Parameter], steps: range) -> None:
        for step in steps:
            for p, gradient in zip(params, gradients(step, params), strict=True):
                p.grad = gradient
            optimizer.step()

    advance(straight, whole, range(4))
    assert straight.param_groups[0]["step"] == 4
    assert all("step" not in state for state in straight.state.values())
    advance(before, first, range(2))
    after = GroupStepAdamW(first, **SETTINGS)
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["step"] == 2
    advance(after, first, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, first, strict=True))


def test_a_group_without_gradients_does_not_count() -> None:
    a, b, _ = parameters()
    optimizer = GroupStepAdamW([{"params": [a]}, {"params": [b]}], **SETTINGS)
    before = b.detach().clone()
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 0]
    assert torch.equal(b, before)  # not even decayed
    assert b not in optimizer.state


def test_coupled_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="decoupled weight decay only"):
        GroupStepAdamW(parameters(), adam_w_mode=False)


def grouped(names: list[str]) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in names]
    groups = [{"params": [p], "group": name} for p, name in zip(params, names, strict=True)]
    return _idle_aware(GroupStepAdamW)(groups, **SETTINGS), params


def test_an_idle_group_neither_moves_nor_counts_nor_loses_momentum() -> None:
    names = ["hlora_comprehension", "hlora_generation", "abstract_adapter", "concrete_adapter", "new_rows"]
    optimizer, params = grouped(names)
    groups = list(optimizer.param_groups)

    def step(active: list[Task]) -> None:
        mark_idle_groups(optimizer, [task.value for task in active])
        for p in params:
            p.grad = torch.full_like(p, 0.5)  # the data-parallel buffer always yields one, zero for an idle task
        optimizer.step()

    step([Task.COMPREHENSION, Task.GENERATION])
    before = [p.detach().clone() for p in params]
    momentum = [optimizer.state[p]["exp_avg"].clone() for p in params]
    step([Task.COMPREHENSION])
    moved = {name: not torch.equal(p, old) for name, p, old in zip(names, params, before, strict=True)}
    counted = {group["group"]: group["step"] for group in optimizer.param_groups}
    kept = {n: torch.equal(optimizer.state[p]["exp_avg"], m) for n, p, m in zip(names, params, momentum, strict=True)}
    for name in names:
        idle = name in ("hlora_generation", "concrete_adapter")
        assert (moved[name], counted[name], kept[name]) == (not idle, 1 if idle else 2, idle), name
    step([Task.GENERATION])
    assert [group["step"] for group in optimizer.param_groups] == [2, 2, 2, 2, 3]
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))


def test_an_idle_group_comes_back_when_a_step_fails() -> None:
    class Failing(GroupStepAdamW):
        def step(self, closure: None = None) -> None:
            raise RuntimeError("device lost")

    optimizer = _idle_aware(Failing)([{"params": parameters(), "idle": True}], **SETTINGS)
    with pytest.raises(RuntimeError, match="device lost"):
        optimizer.step()
    assert len(optimizer.param_groups) == 1


def test_megatron_s_adam_is_replaced_while_its_optimizer_is_built_and_then_put_back() -> None:
    cpu_platform.install_if_needed()
    import megatron.core.optimizer as megatron_optimizer

    before = (megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER)
    with pytest.raises(RuntimeError, match="inside"), _adam_for_megatron():
        assert not megatron_optimizer.USING_PYTORCH_OPTIMIZER
        assert issubclass(megatron_optimizer.Adam, GroupStepAdamW if before[1] else before[0])
        raise RuntimeError("inside")
    assert (megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER) == before


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"abstract_adapter": 3.0}, {"default": 3.0}),
        ({"abstract_adapter": 3.0, "concrete_adapter": 3.0}, {"default": 3.0}),
        ({"vocabulary": 1.0}, {"default": 1.0}),
        ({"hlora_generation": 1.0, "concrete_adapter": 3.0, "new_rows": 1.0}, {"default": 1.0, "adapter": 3.0}),
        ({}, {"default": 0.0}),
    ],
)
def test_learning_rates_tell_adapters_from_the_rest(rates: dict[str, float], expected: dict[str, float]) -> None:
    groups: list[dict[str, Any]] = [{"group": name, "lr": rate} for name, rate in rates.items()]
    # Megatron keeps a group without a stage's name for parameters that no override matched.
    assert learning_rates(SimpleNamespace(param_groups=[*groups, {"lr": 9.0}])) == expected


def schedule(stage: str, steps: int, config: RunConfig | None = None) -> dict[str, list[float]]:
    """Learning rates in use at each step, per group, as the trainer asks for them: before the optimizer's step."""
    cpu_platform.install_if_needed()
    config = RunConfig() if config is None else config
    row = STAGES[stage]
    groups: list[dict[str, Any]] = []
    for group in row.trainable:
        lr = row.lr_of(group, config.optimizer.lr, config.optimizer.adapter_lr)
        groups.append({"group": group, "lr": 0.0, "max_lr": lr, "min_lr": lr * config.optimizer.min_lr_ratio})
    scheduler = build_scheduler(config, row, SimpleNamespace(param_groups=groups), steps)
    rates: dict[str, list[float]] = {group: [] for group in row.trainable}
    for _ in range(steps):
        scheduler.step(1)
        for group in groups:
            rates[group["group"]].append(group["lr"])
    return rates


def test_warm_up_is_a_line_and_cosine_ends_at_zero() -> None:
    rates = schedule("stage3_comprehension", 200)  # 3 % of 200: 6 steps
    for group, peak in (("hlora_comprehension", 2e-4), ("abstract_adapter", 2e-5)):
        expected = [peak * (n / 6 if n <= 6 else 0.5 * (1 + math.cos(math.pi * (n - 6) / 194))) for n in range(1, 201)]
        assert rates[group] == pytest.approx(expected, rel=1e-9, abs=1e-15)  # the same formula in another order
        assert max(rates[group]) == pytest.approx(peak, rel=1e-12)


def test_stage_2_is_constant_from_its_first_step() -> None:
    assert schedule("stage2", 50) == {"vocabulary": [2e-4] * 50}


def test_the_configuration_wins_over_the_table() -> None:
    config = RunConfig()
    config.optimizer.lr, config.optimizer.adapter_lr = 1.0, 4.0
    config.optimizer.schedule, config.optimizer.warmup_ratio, config.optimizer.min_lr_ratio = "linear", 0.0, 0.5
    rates = schedule("stage3_generation", 10, config)
    line = [1 - 0.05 * n for n in range(1, 11)]
    assert rates["hlora_generation"] == pytest.approx(line, rel=1e-12)
    assert rates["concrete_adapter"] == pytest.approx([4 * rate for rate in line], rel=1e-12)


@pytest.mark.parametrize(("ratio", "steps"), [(1.0, 10), (0.9, 1), (0.03, 1)])
def test_warm_up_never_takes_the_whole_run(ratio: float, steps: int) -> None:
    config = RunConfig()
    config.optimizer.warmup_ratio, config.optimizer.schedule = ratio, "constant"
    rates = schedule("stage3_generation", steps, config)["hlora_generation"]
    assert rates[-1] == 2e-4
    assert all(rate > 0 for rate in rates)


def test_the_update_is_torchs_whether_or_not_the_moments_live_in_host_memory() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    values = []
    for build in (
        lambda p: torch.optim.AdamW([p], lr=0.1, weight_decay=0.1),
        lambda p: GroupStepAdamW([{"params": [p]}], lr=0.1, weight_decay=0.1),
        lambda p: GroupStepAdamW([{"params": [p]}], lr=0.1, weight_decay=0.1, state_device=torch.device("cpu")),
    ):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = build(parameter)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        values.append(parameter.detach())
        assert optimizer.state[parameter]["exp_avg"].abs().sum() > 0
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-7)
    assert not torch.equal(values[0], start)
