"""Encoder and decoder of VQGAN with the parameter names of taming-transformers (`modules/diffusionmodules/model.py`).

Shapes: images [n, channels, height, width]; every level but the last halves height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional


@dataclass(kw_only=True, slots=True, frozen=True)
class AutoencoderConfig:
    """`ddconfig` of a taming-transformers model.yaml, with its names."""

    z_channels: int
    resolution: int
    in_channels: int
    out_ch: int
    ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    attn_resolutions: Sequence[int]
    double_z: bool = False
    """Mean and variance instead of one latent (a KL autoencoder); False in every VQGAN."""
    dropout: float = 0.0
    norm_groups: int = 32
    """Groups of every group normalisation: 32 in taming-transformers, whose model.yaml has no such field. With one
    channel a group, normalisation erases an image's brightness, so small models need fewer groups."""

    @property
    def latent_resolution(self) -> int:
        """Side of the grid of latents."""
        return self.resolution // 2 ** (len(self.ch_mult) - 1)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut (1x1 convolution when the number of channels changes)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, groups: int = 32) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.register_module("nin_shortcut", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in_channels, h, w] to [n, out_channels, h, w]."""
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(functional.silu(self.norm2(hidden))))
        return hidden + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention of one head over all positions."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w], kept."""
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(q, k, v)[:, 0]  # scale 1 / sqrt(channels), as in taming
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Strided convolution, padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w] to [n, channels, h/2, w/2]."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel doubled in both directions (nearest neighbour), then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w] to [n, channels, 2h, 2w]."""
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Middle(nn.Module):
    def __init__(self, channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, dropout, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """Residual blocks of one resolution, each with attention where `attention` is set, then `resample` (if any)."""

    def __init__(
        self, widths: list[int], config: AutoencoderConfig, *, attention: bool, resample: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(before, after, config.dropout, config.norm_groups) for before, after in pairwise(widths)
        )
        self.attn = nn.ModuleList(AttnBlock(width, config.norm_groups) for width in widths[1:] if attention)
        self.resample_name = next(iter(resample), None)
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x if self.resample_name is None else self.get_submodule(self.resample_name)(x)


class Encoder(nn.Module):
    """Images [n, in_channels, R, R] to latents [n, z_channels, R/f, R/f]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.ch, *(config.ch * factor for factor in config.ch_mult)]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        levels, resolution = [], config.resolution
        for i, (before, after) in enumerate(pairwise(widths)):
            is_last = i == len(config.ch_mult) - 1
            levels.append(
                _Level(
                    [before] + [after] * config.num_res_blocks,
                    config,
                    attention=resolution in config.attn_resolutions,
                    resample={} if is_last else {"downsample": Downsample(after)},
                )
            )
            resolution //= 2
        self.down = nn.ModuleList(levels)
        self.mid = _Middle(widths[-1], config.dropout, config.norm_groups)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        hidden = self.conv_in(images)
        for level in self.down:
            hidden = level(hidden)
        return self.conv_out(functional.silu(self.norm_out(self.mid(hidden))))


class Decoder(nn.Module):
    """Latents [n, z_channels, R/f, R/f] to images [n, out_ch, R, R]; `up.0` is the finest level."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], config.dropout, config.norm_groups)
        levels = []
        for i, width in enumerate(widths):
            before = widths[min(i + 1, len(widths) - 1)]
            levels.append(
                _Level(
                    [before] + [width] * (config.num_res_blocks + 1),
                    config,
                    attention=config.resolution // 2**i in config.attn_resolutions,
                    resample={"upsample": Upsample(width)} if i else {},
                )
            )
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        hidden = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(functional.silu(self.norm_out(hidden)))
