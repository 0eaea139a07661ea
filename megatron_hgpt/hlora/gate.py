"""The elementwise heart of H-LoRA, between its two small GEMMs: softmax over experts, scale, dropout, multiply.

    z = x P^T        P = [A ; R]: [r + k, in]             (GEMM, elsewhere)
    u = gate(z)      u_j = scale * m_j * z_j * g_{e(j)},  g = softmax(z[r:]) in fp32       (here)
    y += u B^T                                            (GEMM, elsewhere)

Backward, with du given: dz_j = scale * m_j * g_{e(j)} * du_j; dg_e = sum over j of e of scale * m_j * z_j * du_j;
dz_{r+e} = g_e * (dg_e - sum_f g_f dg_f). Only z (and the dropout mask) is kept; g is computed again.

One Triton kernel each way on a GPU (`gate_triton`), plain torch elsewhere. Both are tested against `maths`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _gate_of(z: torch.Tensor, lora_rank: int) -> torch.Tensor:
    """softmax over the last k columns, at least fp32. Shape [..., k]."""
    logits = z[..., lora_rank:]
    return torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def gate_forward(z: torch.Tensor, lora_rank: int, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """u [..., r] from z [..., r + k] in plain torch; `mask` holds 0 or 1 / (1 - p)."""
    gate = _gate_of(z, lora_rank)
    num_experts = gate.shape[-1]
    low_rank = z[..., :lora_rank].unflatten(-1, (num_experts, -1)).to(gate.dtype)
    u = (low_rank * (scale * gate).unsqueeze(-1)).flatten(-2)
    return (u if mask is None else u * mask).to(z.dtype)


def gate_backward(
    du: torch.Tensor, z: torch.Tensor, lora_rank: int, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """dz [..., r + k] from du [..., r] in plain torch."""
    gate = _gate_of(z, lora_rank)
    num_experts = gate.shape[-1]
    scaled = du.to(gate.dtype) * scale
    if mask is not None:
        scaled = scaled * mask
    scaled = scaled.unflatten(-1, (num_experts, -1))
    low_rank = z[..., :lora_rank].unflatten(-1, (num_experts, -1)).to(gate.dtype)
    dgate = (scaled * low_rank).sum(-1)
    dlogits = gate * (dgate - (gate * dgate).sum(-1, keepdim=True))
    return torch.cat([(scaled * gate.unsqueeze(-1)).flatten(-2), dlogits], dim=-1).to(z.dtype)


def _kernels(z: torch.Tensor) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Forward and backward for z's device."""
    if not z.is_cuda:
        return gate_forward, gate_backward
    from megatron_hgpt.hlora import gate_triton

    return gate_triton.gate_forward, gate_triton.gate_backward


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, lora_rank: int, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        ctx.lora_rank, ctx.scale = lora_rank, scale
        ctx.save_for_backward(z, mask)
        return _kernels(z)[0](z, lora_rank, scale, mask)

    @staticmethod
    def backward(ctx: Any, du: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        z, mask = ctx.saved_tensors
        return _kernels(z)[1](du, z, ctx.lora_rank, ctx.scale, mask), None, None, None


def gate(z: torch.Tensor, lora_rank: int, scale: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """u = dropout(scale * z_A) * expand(softmax(z_R)), differentiable in z.

    Args:
        z: [..., r + k], already summed over tensor-parallel ranks where its input was sharded: the softmax is not
            linear, so a partial sum gives a wrong gate without any error.
        lora_rank: r.
        scale: alpha / r * k.
        mask: [..., r] dropout mask of 0 and 1 / (1 - p), or None.

    Returns:
        [..., r] in z's dtype.
    """
    return _Gate.apply(z, lora_rank, scale, mask)
