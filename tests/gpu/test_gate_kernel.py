"""The Triton gate against plain torch, compiled for the GPU (tests/unit/hlora runs it interpreted)."""

from __future__ import annotations

import pytest
import torch

from megatron_hgpt.hlora import gate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Both compute in fp32 and round once to the type of z: at most one unit in its last place, of values of order 10.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-1}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("rank", "experts"), [(16, 4), (64, 4), (256, 8)])
@pytest.mark.parametrize("with_mask", [False, True])
def test_the_kernels_equal_torch(dtype: torch.dtype, rank: int, experts: int, with_mask: bool) -> None:
    from megatron_hgpt.hlora import gate_triton

    generator = torch.Generator("cuda").manual_seed(3)
    z, du = (
        torch.randn(515, 2, 1, width, generator=generator, device="cuda").to(dtype) for width in (rank + experts, rank)
    )
    mask = None
    if with_mask:
        mask = torch.empty(515, 2, 1, rank, device="cuda", dtype=dtype).bernoulli_(0.9, generator=generator) / 0.9
    scale, tolerance = 2.0 * experts, TOLERANCE[dtype]
    for mine, plain in (
        (gate_triton.gate_forward(z, rank, scale, mask), gate.gate_forward(z, rank, scale, mask)),
        (gate_triton.gate_backward(du, z, rank, scale, mask), gate.gate_backward(du, z, rank, scale, mask)),
    ):
        assert plain.float().abs().max() > 1
        torch.testing.assert_close(mine, plain, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=tolerance)
