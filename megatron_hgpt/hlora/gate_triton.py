"""Triton kernels of the H-LoRA gate: one program per token and section, one pass over z each way.

Bytes per token and section: forward reads r + k and writes r values; backward reads 2r + k and writes r + k. At the
sizes of HealthGPT (r <= 256, k = 4) a row fits in registers, so both are bound by memory bandwidth.
For tests they also run on the CPU, in Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported).

This is the one module of the package that imports triton; `gate` imports it at the first CUDA tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _forward_kernel(
    z, mask, u, scale, R: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, M: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns, experts = tl.arange(0, BR), tl.arange(0, BK)
    logits = tl.load(z + row * (R + K) + R + experts, mask=experts < K, other=float("-inf")).to(tl.float32)
    weights = tl.exp(logits - tl.max(logits, 0))
    gate = weights / tl.sum(weights, 0)
    owner = columns // (R // K)
    expanded = tl.sum(tl.where(owner[:, None] == experts[None, :], gate[None, :], 0.0), 1)
    value = tl.load(z + row * (R + K) + columns, mask=columns < R, other=0.0).to(tl.float32) * expanded * scale
    if M:
        value *= tl.load(mask + row * R + columns, mask=columns < R, other=0.0).to(tl.float32)
    tl.store(u + row * R + columns, value.to(u.dtype.element_ty), mask=columns < R)


@triton.jit
def _backward_kernel(
    du, z, mask, dz, scale, R: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, M: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns, experts = tl.arange(0, BR), tl.arange(0, BK)
    logits = tl.load(z + row * (R + K) + R + experts, mask=experts < K, other=float("-inf")).to(tl.float32)
    weights = tl.exp(logits - tl.max(logits, 0))
    gate = weights / tl.sum(weights, 0)
    owns = (columns // (R // K))[:, None] == experts[None, :]
    expanded = tl.sum(tl.where(owns, gate[None, :], 0.0), 1)
    grad = tl.load(du + row * R + columns, mask=columns < R, other=0.0).to(tl.float32) * scale
    if M:
        grad *= tl.load(mask + row * R + columns, mask=columns < R, other=0.0).to(tl.float32)
    value = tl.load(z + row * (R + K) + columns, mask=columns < R, other=0.0).to(tl.float32)
    dgate = tl.sum(tl.where(owns, (grad * value)[:, None], 0.0), 0)
    dlogits = gate * (dgate - tl.sum(gate * dgate, 0))
    tl.store(dz + row * (R + K) + columns, (grad * expanded).to(dz.dtype.element_ty), mask=columns < R)
    tl.store(dz + row * (R + K) + R + experts, dlogits.to(dz.dtype.element_ty), mask=experts < K)


def _block(size: int) -> int:
    return 1 << (size - 1).bit_length()


def gate_forward(z: torch.Tensor, lora_rank: int, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """As `gate.gate_forward`."""
    z = z.contiguous()
    num_experts = z.shape[-1] - lora_rank
    u = z.new_empty(*z.shape[:-1], lora_rank)
    rows = u.numel() // lora_rank
    if rows:
        _forward_kernel[(rows,)](
            z,
            z if mask is None else mask.contiguous(),
            u,
            scale,
            R=lora_rank,
            K=num_experts,
            BR=_block(lora_rank),
            BK=_block(num_experts),
            M=mask is not None,
        )
    return u


def gate_backward(
    du: torch.Tensor, z: torch.Tensor, lora_rank: int, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """As `gate.gate_backward`."""
    z = z.contiguous()
    num_experts = z.shape[-1] - lora_rank
    dz = torch.empty_like(z)
    rows = du.numel() // lora_rank
    if rows:
        _backward_kernel[(rows,)](
            du.contiguous(),
            z,
            z if mask is None else mask.contiguous(),
            dz,
            scale,
            R=lora_rank,
            K=num_experts,
            BR=_block(lora_rank),
            BK=_block(num_experts),
            M=mask is not None,
        )
    return dz
