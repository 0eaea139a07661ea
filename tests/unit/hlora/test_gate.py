"""The gate kernel, plain torch and Triton, against the formula and against autograd."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_hgpt.config import HLoRAPluginConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.hlora import gate as gate_module
from megatron_hgpt.hlora.maths import hlora_delta, hlora_scale, merge

RANK, K = 12, 4


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_gate_between_two_gemms_equals_the_formula() -> None:
    x, a, r, b = tensors((5, 2, 16), (RANK, 16), (K, 16), (7, RANK))
    mask = torch.bernoulli(torch.full((5, 2, RANK), 0.7, dtype=torch.float64)) / 0.7
    u = gate_module.gate(x @ torch.cat([a, r]).T, RANK, 3.0, mask)
    # fp64: only the order of sums differs.
    torch.testing.assert_close(u @ b.T, hlora_delta(x, a, r, b, scale=3.0, dropout_mask=mask), rtol=0, atol=1e-12)


def test_backward_passes_gradcheck() -> None:
    (z,) = tensors((3, RANK + K))
    mask = torch.tensor([0.0, 2.0] * (RANK // 2), dtype=torch.float64).expand(3, RANK)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: gate_module.gate(t, RANK, 1.7, mask), (z,), atol=1e-8)


def test_softmax_is_fp32_for_bf16_input() -> None:
    (z,) = tensors((64, RANK + K))
    z16 = z.bfloat16()
    expected = gate_module.gate_forward(z16.double(), RANK, 1.0, None)
    # One rounding to bf16 at the end: half a unit in the last place, 2^-9 relative.
    torch.testing.assert_close(gate_module.gate(z16, RANK, 1.0).double(), expected, rtol=2**-8, atol=1e-6)


def test_permuting_experts_with_their_router_rows_changes_nothing() -> None:
    x, a, r, b = tensors((6, 16), (RANK, 16), (K, 16), (7, RANK))
    order = torch.tensor([2, 0, 3, 1])
    rows = torch.arange(RANK).view(K, -1)[order].flatten()
    expected = hlora_delta(x, a, r, b, scale=1.0)
    torch.testing.assert_close(hlora_delta(x, a[rows], r[order], b[:, rows], scale=1.0), expected, rtol=0, atol=1e-12)
    # Any other row order hands rows to other experts.
    assert (hlora_delta(x, a[rows], r, b[:, rows], scale=1.0) - expected).abs().max() > 1e-2


def test_equals_a_dense_mixture_of_k_lora_experts() -> None:
    x, a, r, b = tensors((6, 16), (RANK, 16), (K, 16), (7, RANK))
    weights = torch.softmax(x @ r.T, dim=-1)
    size = RANK // K
    experts = [x @ a[e * size : (e + 1) * size].T @ b[:, e * size : (e + 1) * size].T for e in range(K)]
    expected = 8.0 * sum(weights[:, e : e + 1] * experts[e] for e in range(K))
    torch.testing.assert_close(hlora_delta(x, a, r, b, scale=8.0), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rank", "alpha"), [(64, 128.0), (256, 512.0), (32, 64.0)])
def test_released_settings_have_scale_8(rank: int, alpha: float) -> None:
    assert hlora_scale(HLoRAPluginConfig(lora_rank=rank, alpha=alpha, num_experts=4)) == 8.0


def test_merge_is_refused_for_more_than_one_expert() -> None:
    weight, a, b = tensors((7, 16), (RANK, 16), (7, RANK))
    with pytest.raises(ConfigError, match="gate depends on the token"):
        merge(weight, a, b, HLoRAPluginConfig(lora_rank=RANK, num_experts=4))
    plain = HLoRAPluginConfig(lora_rank=RANK, alpha=24.0, num_experts=1)
    (x, r) = tensors((3, 16), (1, 16))
    expected = x @ weight.T + hlora_delta(x, a, r, b, scale=hlora_scale(plain))
    torch.testing.assert_close(x @ merge(weight, a, b, plain).T, expected, rtol=0, atol=1e-12)


TRITON = """
import torch
from megatron_hgpt.hlora import gate, gate_triton
generator = torch.Generator().manual_seed(0)
for rank, k in ((12, 4), (64, 4), (8, 1), (24, 8)):
    z = torch.randn(3, 2, rank + k, generator=generator)
    du = torch.randn(3, 2, rank, generator=generator)
    mask = torch.bernoulli(torch.full((3, 2, rank), 0.5), generator=generator) * 2
    for m in (None, mask):
        # fp32 on both sides: sums of at most 64 products in another order.
        for mine, other in (
            (gate_triton.gate_forward(z, rank, 8.0, m), gate.gate_forward(z, rank, 8.0, m)),
            (gate_triton.gate_backward(du, z, rank, 8.0, m), gate.gate_backward(du, z, rank, 8.0, m)),
        ):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
print("equal")
"""


def test_triton_kernels_equal_plain_torch_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    # A process of its own: the interpreter must be chosen before triton is imported.
    result = subprocess.run(
        [sys.executable, "-c", TRITON], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.stdout.strip() == "equal", result.stderr
