"""VQGAN: images to codebook indices and back, in the file layout of taming-transformers (model.yaml + last.ckpt).

The architecture and the parameter names are those of `taming.models.vqgan.GumbelVQ` and `VQModel`, so that the
"OpenImages f=8, 8192 codes, Gumbel" files that HealthGPT uses load as they are. Indices are in raster order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from megatron_hgpt.errors import CheckpointError, ConfigError, DataError, shown
from megatron_hgpt.safe_pickle import load_tensors
from megatron_hgpt.safe_yaml import read_yaml
from megatron_hgpt.vision.vqgan_blocks import AutoencoderConfig, Decoder, Encoder

GUMBEL = "taming.models.vqgan.GumbelVQ"
NEAREST = "taming.models.vqgan.VQModel"


@dataclass(kw_only=True, slots=True, frozen=True)
class VQGANConfig:
    """What model.yaml says about the architecture, with its names."""

    target: str
    """`taming.models.vqgan.GumbelVQ` (index = argmax of a projection) or `…VQModel` (nearest codebook row)."""
    embed_dim: int
    n_embed: int
    ddconfig: AutoencoderConfig

    @classmethod
    def load(cls, path: Path) -> VQGANConfig:
        """Read a taming-transformers model.yaml; what belongs to training (loss, schedules) is not looked at.

        Raises:
            CheckpointError: the file is missing or is not YAML.
            ConfigError: another model class, a field is missing, unknown or has a wrong value.
        """
        try:
            content = read_yaml(path)
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error}; a VQGAN folder has model.yaml and last.ckpt"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds a {type(content).__name__}; it needs a mapping with the key model")
        try:
            model = content["model"]
            target, params = model["target"], dict(model["params"])
            autoencoder = dict(params["ddconfig"])
            embed_dim, n_embed = params["embed_dim"], params["n_embed"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path} lacks {error}; it needs model.target and model.params with embed_dim, n_embed, ddconfig"
            ) from error
        if target not in (GUMBEL, NEAREST):
            raise ConfigError(f"{path}: model.target={shown(target)} is not supported; use {GUMBEL} or {NEAREST}")
        if params.get("remap") is not None:
            raise ConfigError(
                f"{path}: model.params.remap={shown(params['remap'])} renumbers the indices; it must be absent"
            )
        return cls(
            target=target,
            embed_dim=_size(path, "embed_dim", embed_dim, 2**14),
            n_embed=_size(path, "n_embed", n_embed, 2**20),
            ddconfig=_autoencoder_config(path, autoencoder),
        )


class _GumbelQuantize(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.ddconfig.z_channels, config.n_embed, 1)
        self.embed = nn.Embedding(config.n_embed, config.embed_dim)

    @property
    def codebook(self) -> torch.Tensor:
        return self.embed.weight

    def logits(self, latents: torch.Tensor) -> torch.Tensor:
        return self.proj(latents)


class _NearestQuantize(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.n_embed, config.embed_dim)

    @property
    def codebook(self) -> torch.Tensor:
        return self.embedding.weight

    def logits(self, latents: torch.Tensor) -> torch.Tensor:
        """Minus the squared distance, up to a term that is the same for every code."""
        codes = self.codebook
        return 2 * torch.einsum("nchw,kc->nkhw", latents, codes) - codes.square().sum(1)[:, None, None]


class VQGAN(nn.Module):
    """Encoder, codebook and decoder; frozen and in evaluation mode.

    Attributes:
        num_codes: codebook entries.
        num_indices: indices of one image, (resolution / f)².
        resolution: side of the square image R, pixels.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        autoencoder = config.ddconfig
        if config.target == GUMBEL and config.embed_dim != autoencoder.z_channels:
            raise ConfigError(
                f"embed_dim={config.embed_dim} must equal ddconfig.z_channels={autoencoder.z_channels} for {GUMBEL}"
            )
        self.num_codes = config.n_embed
        self.resolution = autoencoder.resolution
        self._side = autoencoder.latent_resolution
        self.num_indices = self._side**2
        self.encoder = Encoder(autoencoder)
        self.decoder = Decoder(autoencoder)
        self.quantize = _GumbelQuantize(config) if config.target == GUMBEL else _NearestQuantize(config)
        self.quant_conv = nn.Conv2d(autoencoder.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, autoencoder.z_channels, 1)
        self.is_gumbel = config.target == GUMBEL
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> VQGAN:
        """Read `model.yaml` and `last.ckpt`; the weights of the training loss (`loss.*`) are left out.

        Raises:
            CheckpointError: a file is missing or damaged, or its tensors are not those of model.yaml.
            ConfigError: model.yaml describes something else.
        """
        folder = Path(folder)
        config = VQGANConfig.load(folder / "model.yaml")
        with torch.device("meta"):
            model = cls(config)
        state = _read_state(folder / "last.ckpt")
        _check_state(folder / "last.ckpt", state, model.state_dict())
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        return model.to(device).requires_grad_(False)

    def train(self, mode: bool = True) -> VQGAN:
        """Stay in evaluation mode: the VQGAN is frozen in every stage."""
        return super().train(False)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """What is quantised: [n, embed_dim, R/f, R/f] of images [n, 3, R, R] in [-1, 1]; differentiable."""
        return self.quant_conv(self.encoder(images))

    def codes(self, indices: torch.Tensor) -> torch.Tensor:
        """Codebook rows [n, embed_dim, R/f, R/f] of indices [n, num_indices]."""
        grid = indices.view(-1, self._side, self._side)
        return nn.functional.embedding(grid, self.quantize.codebook).permute(0, 3, 1, 2).contiguous()

    def images(self, codes: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, R, R], not clamped, of codebook rows [n, embed_dim, R/f, R/f]; differentiable."""
        return self.decoder(self.post_quant_conv(codes))

    @torch.no_grad()
    def encode(
        self, images: torch.Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Codebook indices.

        Args:
            images: [n, 3, R, R] in [-1, 1].
            sample: draw each index from the softmax of its logits (what HealthGPT's release does, by Gumbel noise)
                instead of taking the most likely one.
            generator: source of the noise, on the device of the images.

        Returns:
            int64 [n, num_indices] in raster order.

        Raises:
            DataError: the images have another shape.
            ConfigError: `sample` for a model without a distribution over codes (`VQModel`).
        """
        expected = (3, self.resolution, self.resolution)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise DataError(f"images have shape {tuple(images.shape)}; VQGAN.encode takes [n, {str(expected)[1:-1]}]")
        logits = self.quantize.logits(self.latents(images))
        if sample:
            if not self.is_gumbel:
                raise ConfigError(f"a VQGAN of type {NEAREST} has no distribution to sample indices from")
            logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
        return logits.argmax(dim=1).flatten(1)

    @torch.no_grad()
    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, R, R] in [-1, 1] of int64 indices [n, num_indices].

        Raises:
            DataError: another number of indices, or one outside the codebook.
        """
        if indices.dim() != 2 or indices.shape[1] != self.num_indices:
            raise DataError(f"indices have shape {tuple(indices.shape)}; VQGAN.decode takes [n, {self.num_indices}]")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_codes:
            raise DataError(
                f"indices span {int(indices.min())} to {int(indices.max())}; the codebook has {self.num_codes} entries"
            )
        return self.images(self.codes(indices)).clamp(-1, 1)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Resize (LANCZOS, aspect not kept) to float32 [3, R, R] in [-1, 1], on the CPU."""
        size = (self.resolution, self.resolution)
        pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
        return (torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1).contiguous()

    @staticmethod
    def to_pil(image: torch.Tensor) -> Image.Image:
        """The 8-bit RGB image of [3, R, R] in [-1, 1]; values outside are clamped."""
        pixels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _size(path: Path, name: str, value: object, most: int) -> int:
    """A size of the architecture; above `most` no VQGAN has it, and building it would take the machine's memory."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(f"{path}: {name}={shown(value)} must be a positive integer, at most {most}")
    return value


_LARGEST = {"z_channels": 2**14, "resolution": 2**13, "in_channels": 3, "out_ch": 3, "ch": 2**12, "num_res_blocks": 64}
"""Of ddconfig."""
_MOST_LEVELS = 16


def _autoencoder_config(path: Path, values: dict[str, Any]) -> AutoencoderConfig:
    known = {field.name for field in fields(AutoencoderConfig)}
    missing = sorted(known - {"double_z", "dropout", "norm_groups"} - set(values))
    unknown = sorted(set(map(str, values)) - known)
    if missing or unknown:
        raise ConfigError(
            f"{path}: ddconfig lacks {missing} and has unknown {shown(unknown)}; known are {sorted(known)}"
        )
    _size(path, "ddconfig.norm_groups", values.get("norm_groups", 32), 2**12)
    for name, most in _LARGEST.items():
        _size(path, f"ddconfig.{name}", values[name], most)
    for name, most in (("ch_mult", 64), ("attn_resolutions", 2**13)):
        if not isinstance(values[name], (list, tuple)) or len(values[name]) > _MOST_LEVELS:
            raise ConfigError(
                f"{path}: ddconfig.{name}={shown(values[name])} must be a list of integers, {_MOST_LEVELS} at most"
            )
        values[name] = tuple(_size(path, f"ddconfig.{name}", value, most) for value in values[name])
    config = AutoencoderConfig(**values)
    if not config.ch_mult or config.resolution % 2 ** (len(config.ch_mult) - 1):
        raise ConfigError(
            f"{path}: ddconfig.resolution={config.resolution} does not fit ddconfig.ch_mult={config.ch_mult}"
        )
    if any(config.ch * factor % config.norm_groups for factor in (1, *config.ch_mult)):
        raise ConfigError(
            f"{path}: ddconfig.ch={config.ch} must be a multiple of {config.norm_groups}, the groups of normalisation"
        )
    if config.double_z:
        raise ConfigError(f"{path}: ddconfig.double_z=true is a KL autoencoder; a VQGAN has double_z=false")
    if (config.in_channels, config.out_ch) != (3, 3):
        raise ConfigError(f"{path}: in_channels={config.in_channels}, out_ch={config.out_ch}; RGB images need 3 and 3")
    return config


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the autoencoder as they were stored; those of the training loss are left out."""
    content = load_tensors(path, CheckpointError)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no 'state_dict': a VQGAN's last.ckpt is {{'state_dict': tensors}}")
    state = {name: tensor for name, tensor in state.items() if not str(name).startswith("loss.")}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: state_dict holds {shown(name)}, a {type(tensor).__name__}, beside tensors")
    return state


def _check_state(path: Path, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    reshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or unexpected or reshaped:
        raise CheckpointError(
            f"{path} does not fit model.yaml beside it: missing {missing[:9]}, unexpected {shown(unexpected[:9])}, "
            f"shapes {reshaped[:9]}"
        )
