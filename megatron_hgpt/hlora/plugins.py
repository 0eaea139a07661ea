"""One H-LoRA plugin on one linear: its parameters, their sharding, and the branch between input and output.

A fused linear can hold several HF linears. Phi fuses them in the checkpoint too, so one A/R serves all of them;
Llama and Qwen keep q, k, v and gate, up apart, each with an A/R of its own. `BranchLayout` says which:

    sections    independent A/R pairs, stacked in one GEMM                  Phi qkv: 1, Qwen qkv: 3
    parts       output blocks, each with its B and the section it reads     qkv: (q, k, v), fc1: (gate, up)

B is stored per part (not in Megatron's fused row order), so that its shards are plain contiguous rows at every
tensor-parallel size; `assemble` puts the parts' outputs into the base linear's order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from megatron_hgpt.config import HLoRAPluginConfig
from megatron_hgpt.hlora.gate import gate
from megatron_hgpt.hlora.maths import hlora_scale


@dataclass(frozen=True, kw_only=True)
class BranchLayout:
    """How the branch of one fused linear is cut; sizes are full (unsharded) output features.

    Llama's QKV with 4 query heads, 2 KV heads and a head size of 1: q, k and v each have their own A, R and B.

        >>> names = ("q", "k", "v")
        >>> layout = BranchLayout(part_sizes=(4, 2, 2), part_names=names, num_sections=3, interleave_groups=2)
        >>> [layout.section_of(part) for part in range(3)]
        [0, 1, 2]

    Megatron's QKV holds the rows of one KV group after another: two queries, their key, their value.

        >>> q, k, v = torch.tensor([10, 11, 12, 13]), torch.tensor([20, 21]), torch.tensor([30, 31])
        >>> layout.assemble([q, k, v], tp_size=1).tolist()
        [10, 11, 20, 30, 12, 13, 21, 31]

    With two tensor-parallel ranks each has one group. Its shard of every part is a plain slice of consecutive rows.

        >>> layout.assemble([q[2:], k[1:], v[1:]], tp_size=2).tolist()
        [12, 13, 21, 31]

    Phi's checkpoint has one QKV linear, so all three parts read the same A and R.

        >>> phi = BranchLayout(part_sizes=(4, 2, 2), part_names=names, interleave_groups=2)
        >>> [phi.section_of(part) for part in range(3)]
        [0, 0, 0]
    """

    part_sizes: tuple[int, ...]
    num_sections: int = 1
    """1, or one per part."""
    part_names: tuple[str, ...] = ("out",)
    interleave_groups: int = 1
    """KV groups whose (q, k, v) rows alternate in the base weight; 1 concatenates the parts."""

    def section_of(self, part: int) -> int:
        """The section that feeds a part."""
        return part if self.num_sections > 1 else 0

    def assemble(self, outputs: list[torch.Tensor], tp_size: int, *, dim: int = -1) -> torch.Tensor:
        """Parts [..., part/T] (or B rows with dim=0) in the base linear's row order [..., out/T]."""
        if len(outputs) == 1:
            return outputs[0]
        groups = self.interleave_groups // tp_size if self.interleave_groups > 1 else 1
        if groups == 1:
            return torch.cat(outputs, dim=dim)
        blocks = [output.unflatten(dim, (groups, -1)) for output in outputs]
        inner = dim if dim < 0 else dim + 1
        return torch.cat(blocks, dim=inner).flatten(inner - 1, inner)


class HLoRAPlugin(nn.Module):
    """Parameters of one plugin on one linear.

    Attributes:
        lora_p: [sections * (r + k), in] (in / T on a row-parallel linear): per section A then R.
        lora_b: one [part / T, r] (part on a row-parallel linear) per part, initially zero.
    """

    def __init__(
        self,
        config: HLoRAPluginConfig,
        layout: BranchLayout,
        *,
        input_size: int,
        output_divisor: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.scale = hlora_scale(config)
        self.dropout = config.dropout
        width = layout.num_sections * (config.lora_rank + config.num_experts)
        self.lora_p = nn.Parameter(torch.empty(width, input_size, dtype=dtype, device=device))
        self.lora_b = nn.ParameterList(
            nn.Parameter(torch.zeros(size // output_divisor, config.lora_rank, dtype=dtype, device=device))
            for size in layout.part_sizes
        )

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """z = x P^T: [..., sections, r + k]; a partial sum where x is sharded on features."""
        return F.linear(x, self.lora_p).unflatten(-1, (self.layout.num_sections, -1))

    def gate(
        self,
        z: torch.Tensor,
        rng_context: Callable[[], AbstractContextManager[None]],
        token_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """u [s, b, sections, r] from complete (reduced) z.

        Args:
            z: [s, b, sections, r + k].
            rng_context: opens the generator that dropout draws from.
            token_mask: bool [s], the tokens this plugin works on; u is 0 at the others. None is all.
        """
        mask = None
        if self.training and self.dropout > 0.0:
            keep = 1.0 - self.dropout
            with rng_context():
                mask = torch.empty(*z.shape[:-1], self.config.lora_rank, dtype=z.dtype, device=z.device)
                mask.bernoulli_(keep)
            mask.div_(keep)
        if token_mask is not None:
            mine = token_mask.to(z.dtype)[:, None, None, None].expand(*z.shape[:-1], self.config.lora_rank)
            mask = mine if mask is None else mask * mine
        return gate(z, self.config.lora_rank, self.scale, mask)

    def expand(self, u: torch.Tensor, tp_size: int) -> torch.Tensor:
        """u B^T in the base linear's output order: [..., out / tp_size]."""
        layout = self.layout
        if layout.num_sections == 1:
            return F.linear(u.squeeze(-2), layout.assemble(list(self.lora_b), tp_size, dim=0))
        outputs = [F.linear(u[..., layout.section_of(i), :], b) for i, b in enumerate(self.lora_b)]
        return layout.assemble(outputs, tp_size)
