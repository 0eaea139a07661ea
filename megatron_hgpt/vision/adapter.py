"""The adapter from CLIP features to the LLM's hidden size (HealthGPT release: `mm_projector`, mlp2x_gelu)."""

from __future__ import annotations

import torch
from torch import nn


class VisionAdapter(nn.Sequential):
    """Linear, exact GELU, Linear, both with bias; replicated on every tensor-parallel rank.

    The parameter names ``0`` and ``2`` are those of the released weight files (`mm_projector.{0,2}`).
    """

    def __init__(self, vision_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(
            nn.Linear(vision_size, hidden_size, dtype=dtype, device=device),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size, dtype=dtype, device=device),
        )
