"""Both plugins in one row: each token gets the output, and gives the gradients, of its own task's plugin in fp64.

The runs with one task, which test_hlora_linear holds against the formula, are the reference: the branch is linear in
the tokens it serves.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hgpt.config import HLoRAPluginConfig, ParallelConfig
from megatron_hgpt.samples import Task
from megatron_hgpt.testing.distributed import run_ranks

# fp64 sums of a few hundred products in another order differ by some 1e-15 relative; values are of order 1 to 100.
TOLERANCE = 1e-12
B, IN, OUT, TP = 2, 16, 24, 2
TOKEN_TASKS = torch.tensor([0, 0, 1, 0, 1, 1, 1, 0], dtype=torch.uint8)
PLUGINS = {
    Task.COMPREHENSION: HLoRAPluginConfig(lora_rank=8, alpha=2.0, num_experts=4, dropout=0.0),
    Task.GENERATION: HLoRAPluginConfig(lora_rank=4, alpha=1.0, num_experts=2, dropout=0.0),
}
CLASSES = {
    "column": ("megatron_hgpt.hlora.linear", "HLoRAColumnParallelLinear"),
    "row": ("megatron_hgpt.hlora.linear", "HLoRARowParallelLinear"),
    "column with norm, Transformer Engine": ("megatron_hgpt.hlora.te_linear", "HLoRATELayerNormColumnParallelLinear"),
    "row, Transformer Engine": ("megatron_hgpt.hlora.te_linear", "HLoRATERowParallelLinear"),
}


def build(name: str, sp: bool) -> Any:
    """The linear with both plugins and random weights; replicated factors are alike on both ranks."""
    import importlib

    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_hgpt.hlora.plugins import BranchLayout
    from megatron_hgpt.model.initialization import generator_for

    module, cls = CLASSES[name]
    is_column = name.startswith("column")
    config = TransformerConfig(
        num_layers=1, hidden_size=IN, num_attention_heads=8, num_query_groups=4, params_dtype=torch.float64,
        tensor_model_parallel_size=TP, sequence_parallel=sp, use_cpu_initialization=True, perform_initialization=False,
        gradient_accumulation_fusion=False, normalization="RMSNorm",
    )  # fmt: skip
    parts = (OUT // 2, OUT // 2) if is_column else (OUT,)
    layer = getattr(importlib.import_module(module), cls)(
        IN, OUT, config=config, init_method=torch.nn.init.zeros_, bias=False, skip_bias_add=True, is_expert=False,
        **({"gather_output": False} if is_column else {"input_is_parallel": True}),
        hlora_plugins=PLUGINS, hlora_layout=BranchLayout(part_sizes=parts, num_sections=len(parts)),
    )  # fmt: skip
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            own = f"{key} of {rank}" if getattr(parameter, "tensor_model_parallel", False) else key
            parameter.copy_(torch.randn(parameter.shape, generator=generator_for(own, 7), dtype=torch.float64))
    layer.weight.requires_grad_(False)
    return layer


def run_layer(
    layer: Any, x: torch.Tensor, cotangent: torch.Tensor, *, task: Task | None, token_tasks: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    layer.active_task, layer.token_tasks = task, token_tasks
    x = x.clone().requires_grad_()
    y, _ = layer(x)
    (y * cotangent).sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.hlora.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def deviation(name: str, sp: bool, *, drop_mask: bool) -> float:
    """Largest difference between the mixed run and the two single ones on this rank."""
    from megatron.core import parallel_state

    from megatron_hgpt.model.initialization import generator_for

    rank = parallel_state.get_tensor_model_parallel_rank()
    layer = build(name, sp)
    if drop_mask:
        select = layer._active_plugins
        layer._active_plugins = lambda: [(plugin, None) for plugin, _ in select()]
    is_column = name.startswith("column")
    num_tokens = len(TOKEN_TASKS)
    mine = TOKEN_TASKS.chunk(TP)[rank]
    x_tokens, y_tokens = (mine, TOKEN_TASKS) if is_column else (TOKEN_TASKS, mine)
    if not sp:
        x_tokens = y_tokens = TOKEN_TASKS
    x = torch.randn(num_tokens, B, IN, generator=generator_for("x", 7), dtype=torch.float64)
    if not is_column:
        x = x.chunk(TP, dim=2)[rank]
    elif sp:
        x = x.chunk(TP)[rank]
    assert len(x) == len(x_tokens)
    width = OUT // TP if is_column else OUT
    own = f"cotangent {rank}" if is_column or sp else "cotangent"
    cotangent = torch.randn(len(y_tokens), B, width, generator=generator_for(own, 7), dtype=torch.float64)

    mixed = run_layer(layer, x, cotangent, task=None, token_tasks=TOKEN_TASKS)
    expected: dict[str, Any] = {"y": 0, "dx": 0}
    for task in Task:
        served = (y_tokens == task.code).double()[:, None, None]
        single = run_layer(layer, x, cotangent * served, task=task, token_tasks=None)
        expected["y"] = expected["y"] + single.pop("y") * served
        expected["dx"] = expected["dx"] + single.pop("dx")
        expected |= {key: value for key, value in single.items() if key.startswith(task.value)}
    assert mixed.keys() == expected.keys()
    return max(float((mixed[key] - expected[key]).abs().max()) for key in expected)


def run_deviations(drop_mask: bool) -> dict[str, float]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "fake_te"))
    from megatron_hgpt import distributed

    distributed.initialize(ParallelConfig(tensor_model_parallel_size=TP), seed=1)
    return {f"{name}, SP {sp}": deviation(name, sp, drop_mask=drop_mask) for name in CLASSES for sp in (False, True)}


@pytest.mark.parametrize("drop_mask", [False, True], ids=["right", "without token masks"])
def test_every_token_meets_its_own_plugin(drop_mask: bool) -> None:
    for deviations in run_ranks(run_deviations, TP, drop_mask, fresh=True):
        assert len(deviations) == 2 * len(CLASSES)
        wrong = {name: value for name, value in deviations.items() if value > TOLERANCE}
        assert len(wrong) == (len(deviations) if drop_mask else 0), wrong
