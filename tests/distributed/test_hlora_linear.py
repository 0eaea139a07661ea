"""H-LoRA's parallel linears against the formula in fp64: output and every gradient, at TP 1, 2, 4, with and without SP.

Two faults that no shape or first-step loss would show are put in on purpose, and must be seen.

Transformer Engine's linears run too, on tests/fake_te, which says what that proves and what it does not.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_hgpt.config import HLoRAPluginConfig, ParallelConfig
from megatron_hgpt.samples import Task
from megatron_hgpt.testing.distributed import run_ranks

# fp64 sums of a few hundred products in another order differ by some 1e-15 relative; values are of order 1 to 100.
TOLERANCE = 1e-12

GATE_FIRST, NO_FLAG = "gate before the reduction", "no sequence-parallel flag"

S, B, IN, HEADS, KV, D, FFN, RANK, K = 8, 2, 16, 8, 4, 2, 24, 8, 4

CASES = {
    "qkv, one section": ("column", (HEADS * D, KV * D, KV * D), 1, KV),
    "qkv, own section each": ("column", (HEADS * D, KV * D, KV * D), 3, KV),
    "gate and up, one section": ("column", (FFN, FFN), 1, 1),
    "gate and up, own section each": ("column", (FFN, FFN), 2, 1),
    "row": ("row", (IN,), 1, 1),
}


def draw(name: str, *shape: int) -> torch.Tensor:
    from megatron_hgpt.model.initialization import generator_for

    return torch.randn(*shape, generator=generator_for(name, 7), dtype=torch.float64)


def reference(x: torch.Tensor, parts: tuple[int, ...], sections: int, groups: int, tp: int) -> dict[str, torch.Tensor]:
    """The unsharded layer by the formula on x, with gradients of a fixed random projection of its output."""
    from megatron_hgpt.hlora.maths import hlora_delta

    tensors = {
        "x": x,
        "weight": draw("w", sum(parts), IN),
        "p": draw("p", sections * (RANK + K), IN),
        **{f"b{i}": draw(f"b{i}", size, RANK) for i, size in enumerate(parts)},
    }
    for name in tensors:
        if name != "weight":
            tensors[name].requires_grad_()
    outputs = []
    for i in range(len(parts)):
        section = tensors["p"].unflatten(0, (sections, -1))[i if sections > 1 else 0]
        outputs.append(
            hlora_delta(tensors["x"], section[:RANK], section[RANK:], tensors[f"b{i}"], scale=2.0 / RANK * K)
        )
    # Megatron's order of the fused rows: per KV group q, k, v; per tensor-parallel rank gate, up.
    blocks = groups if groups > 1 else tp if len(parts) > 1 else 1
    delta = torch.cat([output.unflatten(-1, (blocks, -1)) for output in outputs], dim=-1).flatten(-2)
    y = tensors["x"] @ tensors["weight"].T + delta
    (y * draw("projection", *y.shape)).sum().backward()
    return {"y": y.detach(), **{f"d{name}": tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}}


def shard(tensor: torch.Tensor, dim: int, tp: int, rank: int) -> torch.Tensor:
    return tensor.chunk(tp, dim=dim)[rank]


@contextlib.contextmanager
def gate_before_reduction(branch: Any, sp: bool) -> Iterator[None]:
    """Swap the two steps of the row-parallel branch: gate the partial sums, then reduce."""
    from megatron_hgpt.hlora import linear

    name = "reduce_scatter_to_sequence_parallel_region" if sp else "reduce_from_tensor_model_parallel_region"
    reduce, gate = getattr(linear, name), branch.gate
    with (
        mock.patch.object(linear, name, lambda z, group: reduce(gate(z, contextlib.nullcontext), group=group)),
        mock.patch.object(branch, "gate", lambda u, _rng_context, _token_mask: u),
    ):
        yield


LOCAL, TE, TE_NORM = "local", "Transformer Engine", "Transformer Engine, norm fused"


def linear_class(implementation: str, kind: str) -> type:
    from megatron_hgpt.hlora import linear

    if implementation == LOCAL:
        return linear.HLoRAColumnParallelLinear if kind == "column" else linear.HLoRARowParallelLinear
    from megatron_hgpt.hlora import te_linear

    if kind == "row":
        return te_linear.HLoRATERowParallelLinear
    fused, plain = te_linear.HLoRATELayerNormColumnParallelLinear, te_linear.HLoRATEColumnParallelLinear
    return fused if implementation == TE_NORM else plain


def run_case(name: str, implementation: str, tp: int, sp: bool, fault: str | None) -> float:
    """Largest deviation of the parallel layer from the formula on this rank."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_hgpt.hlora.plugins import BranchLayout

    kind, parts, sections, groups = CASES[name]
    rank = parallel_state.get_tensor_model_parallel_rank()
    config = TransformerConfig(
        num_layers=1, hidden_size=IN, num_attention_heads=HEADS, num_query_groups=KV, params_dtype=torch.float64,
        tensor_model_parallel_size=tp, sequence_parallel=sp, use_cpu_initialization=True, perform_initialization=False,
        gradient_accumulation_fusion=False, normalization="RMSNorm",
    )  # fmt: skip
    layout = BranchLayout(part_sizes=parts, num_sections=sections, interleave_groups=groups)
    plugin = HLoRAPluginConfig(lora_rank=RANK, alpha=2.0, num_experts=K, dropout=0.0)
    extra = {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
    layer = linear_class(implementation, kind)(
        IN, sum(parts), config=config, init_method=torch.nn.init.zeros_, bias=False, skip_bias_add=True, **extra,
        is_expert=False,
        hlora_plugins={Task.COMPREHENSION: plugin}, hlora_layout=layout,
    )  # fmt: skip
    layer.active_task = Task.COMPREHENSION
    branch = layer.hlora["comprehension"]
    in_dim, out_dim = (None, 0) if kind == "column" else (1, None)

    def part(tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
        return tensor if dim is None else shard(tensor, dim, tp, rank)

    with torch.no_grad():
        layer.weight.copy_(part(draw("w", sum(parts), IN), 0 if kind == "column" else 1))
        branch.lora_p.copy_(part(draw("p", sections * (RANK + K), IN), in_dim))
        for i, b in enumerate(branch.lora_b):
            b.copy_(part(draw(f"b{i}", parts[i], RANK), out_dim))
    layer.weight.requires_grad_(False)
    x = draw("x", S, B, IN)
    if kind == "column" and implementation == TE_NORM:
        with torch.no_grad():
            layer.layer_norm_weight.copy_(draw("norm", IN))
        layer.layer_norm_weight.requires_grad_(False)
        raw = x.clone().requires_grad_()
        normalised = torch.nn.functional.rms_norm(raw, (IN,), draw("norm", IN), config.layernorm_epsilon)
        expected = reference(normalised.detach(), parts, sections, groups, tp)
        normalised.backward(expected["dx"])
        expected["dx"] = raw.grad
    else:
        expected = reference(x, parts, sections, groups, tp)
        x = x.detach()

    x = (shard(x, 0, tp, rank) if sp else x) if kind == "column" else shard(x, 2, tp, rank)
    x = x.clone().requires_grad_()
    with gate_before_reduction(branch, sp) if fault == GATE_FIRST and kind == "row" else contextlib.nullcontext():
        y, _ = layer(x)

    def local_output(full: torch.Tensor) -> torch.Tensor:
        return shard(full, -1, tp, rank) if kind == "column" else (shard(full, 0, tp, rank) if sp else full)

    (y * local_output(draw("projection", *expected["y"].shape))).sum().backward()
    for parameter in branch.parameters():
        # What finalize_model_grads does: sums over T exactly the parameters that carry the flag.
        flagged = getattr(parameter, "sequence_parallel", False) and fault != NO_FLAG
        if flagged and tp > 1:
            torch.distributed.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
    dx = expected["dx"]
    differences = [
        y.detach() - local_output(expected["y"]),
        x.grad - ((shard(dx, 0, tp, rank) if sp else dx) if kind == "column" else shard(dx, 2, tp, rank)),
        branch.lora_p.grad - part(expected["dp"], in_dim),
        *(b.grad - part(expected[f"db{i}"], out_dim) for i, b in enumerate(branch.lora_b)),
    ]
    return max(float(difference.abs().max()) for difference in differences)


def run_cases(tp: int, fault: str | None, implementations: tuple[str, ...] = (LOCAL,)) -> dict[str, float]:
    if implementations != (LOCAL,):
        sys.path.insert(0, str(Path(__file__).parents[1] / "fake_te"))
    from megatron_hgpt import distributed

    distributed.initialize(ParallelConfig(tensor_model_parallel_size=tp), seed=1)
    return {
        f"{name}, {implementation}, SP {'on' if sp else 'off'}": run_case(name, implementation, tp, sp, fault)
        for name in CASES
        for implementation in implementations
        for sp in ((False, True) if tp > 1 else (False,))
    }


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_output_and_gradients_equal_the_formula(tp: int) -> None:
    for deviations in run_ranks(run_cases, tp, tp, None):
        assert len(deviations) == len(CASES) * (2 if tp > 1 else 1)
        assert {name: value for name, value in deviations.items() if value > TOLERANCE} == {}


@pytest.mark.parametrize("tp", [1, 2])
def test_transformer_engines_linears_equal_the_formula(tp: int) -> None:
    for deviations in run_ranks(run_cases, tp, tp, None, (TE, TE_NORM), fresh=True):
        assert len(deviations) == 2 * len(CASES) * (2 if tp > 1 else 1)
        assert {name: value for name, value in deviations.items() if value > TOLERANCE} == {}


@pytest.mark.parametrize("fault", [NO_FLAG, GATE_FIRST])
def test_faults_in_transformer_engines_linears_are_seen(fault: str) -> None:
    for deviations in run_ranks(run_cases, 2, 2, fault, (TE, TE_NORM), fresh=True):
        faulty = "SP on" if fault == NO_FLAG else "row"
        assert all(value > 1e-3 for name, value in deviations.items() if faulty in name)


def test_a_missing_sequence_parallel_flag_is_seen() -> None:
    for deviations in run_ranks(run_cases, 2, 2, NO_FLAG):
        # Only replicated factors under SP need the flag; all else must still be right.
        assert all(value > 1e-3 for name, value in deviations.items() if "SP on" in name)
        assert all(value <= TOLERANCE for name, value in deviations.items() if "SP off" in name)


def test_a_gate_before_the_reduction_is_seen() -> None:
    for deviations in run_ranks(run_cases, 2, 2, GATE_FIRST):
        assert all(value > 1e-3 for name, value in deviations.items() if name.startswith("row"))
