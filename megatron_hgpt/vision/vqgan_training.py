"""Training a small VQGAN from scratch on a CPU, for demonstrations and tests.

No adversarial and no perceptual loss: the continuous autoencoder first, then k-means puts the codebook where the
latents are (so that no code is dead), then the decoder learns to draw from codes. The encoder no longer changes in that
part, and the projection is set so that the argmax of `GumbelVQ` is exactly the nearest codebook row.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import nn
from torch.nn import functional

from megatron_hgpt.errors import ConfigError, DataError
from megatron_hgpt.files import replace_folder
from megatron_hgpt.vision.vqgan import GUMBEL, VQGAN, VQGANConfig
from megatron_hgpt.vision.vqgan_blocks import AttnBlock, AutoencoderConfig, ResnetBlock

logger = logging.getLogger(__name__)

_BATCH_SIZE = 8
_EVALUATION_BATCH = 16
_LEARNING_RATE = 2e-3
_CONTINUOUS_PART = 0.6
_KMEANS_ROUNDS = 20
_EMBED_DIM = 32


def train_vqgan(
    images: Sequence[Image.Image],
    folder: Path,
    *,
    resolution: int = 64,
    num_codes: int = 256,
    num_steps: int,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Train an f=8 VQGAN on `images` and write `model.yaml` and `last.ckpt`.

    Args:
        images: at least one; each is resized to resolution x resolution.
        folder: must not exist yet, or be empty; it appears with both files or not at all.
        resolution: side R of the images, pixels; a multiple of 8. An image has (R / 8)² indices.
        num_steps: optimizer steps of both parts together.
        progress: called after every step with its number (from 1) and the loss.

    Returns:
        `psnr` (dB, of images in [0, 1], over all training images together), `codes_used` (of `num_codes`), `seconds`.

    Raises:
        ConfigError: a number is out of its range.
        DataError: no images, fewer latents than codes, or `folder` cannot be written.
    """
    check_settings(folder, resolution=resolution, num_codes=num_codes, num_steps=num_steps)
    latents = len(images) * (resolution // 8) ** 2
    if latents < num_codes:
        raise DataError(
            f"{len(images)} images of {resolution} pixels have {latents} latents, fewer than num_codes={num_codes}; "
            "give more images, a larger resolution or fewer codes"
        )
    with replace_folder(folder) as temporary:  # before the work: what cannot be written is said at once
        config = _config(resolution, num_codes)
        model, result = _train(images, config, num_steps, seed, progress)
        (temporary / "model.yaml").write_text(yaml.safe_dump(_model_yaml(config), sort_keys=False))
        content = io.BytesIO()  # torch's own writer answers a full disk with an internal error
        torch.save({"state_dict": model.state_dict()}, content)
        (temporary / "last.ckpt").write_bytes(content.getbuffer())
    logger.info("VQGAN: %.2f dB, %d of %d codes, %.0f s", *list(result.values())[:2], num_codes, result["seconds"])
    return result


def _train(
    images: Sequence[Image.Image],
    config: VQGANConfig,
    num_steps: int,
    seed: int,
    progress: Callable[[int, float], None] | None,
) -> tuple[VQGAN, dict[str, float]]:
    """The model and the figures of `train_vqgan`."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = VQGAN(config)
    _initialize(model, generator)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a sixth faster on a CPU
    pixels = torch.stack([model.preprocess(image) for image in images])
    split = min(max(1, round(num_steps * _CONTINUOUS_PART)), num_steps - 1)

    views = torch.cat([pixels, pixels.flip(3)])  # mirrored images are as good to learn from
    decoder = [*model.post_quant_conv.parameters(), *model.decoder.parameters()]
    encoder = [*model.encoder.parameters(), *model.quant_conv.parameters()]
    fit = functools.partial(_fit, targets=views, generator=generator, progress=progress)
    fit(encoder + decoder, lambda batch: model.images(model.latents(batch)), views, steps=range(split))
    _set_codebook(model, views, generator)
    fit(decoder, model.images, _codes(model, views), steps=range(split, num_steps))
    return model, _evaluate(model, pixels) | {"seconds": time.perf_counter() - start}


def check_settings(folder: Path, *, resolution: int, num_codes: int, num_steps: int) -> None:
    """What can be refused before a picture is read.

    Raises:
        ConfigError: a number is out of its range.
        DataError: `folder` is in use.
    """
    if resolution < 8 or resolution % 8:
        raise ConfigError(f"resolution={resolution} must be a positive multiple of 8")
    if num_codes < 1:
        raise ConfigError(f"num_codes={num_codes} must be at least 1")
    if num_steps < 2:
        raise ConfigError(f"num_steps={num_steps} must be at least 2: one for the autoencoder, one for the decoder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty; choose another folder for the VQGAN")


def _config(resolution: int, num_codes: int) -> VQGANConfig:
    autoencoder = AutoencoderConfig(
        z_channels=_EMBED_DIM,
        resolution=resolution,
        in_channels=3,
        out_ch=3,
        ch=16,
        ch_mult=(1, 2, 4, 4),
        num_res_blocks=1,
        attn_resolutions=(),
        norm_groups=4,
    )
    return VQGANConfig(target=GUMBEL, embed_dim=_EMBED_DIM, n_embed=num_codes, ddconfig=autoencoder)


@torch.no_grad()
def _initialize(model: VQGAN, generator: torch.Generator) -> None:
    """Weights with which convolutions keep the variance and residual branches add nothing at first.

    With PyTorch's own initial weights the image would drown in the biases.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, AttnBlock):
            nn.init.zeros_(module.proj_out.weight)


def _fit(
    parameters: list[nn.Parameter],
    forward: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    *,
    targets: torch.Tensor,
    steps: range,
    generator: torch.Generator,
    progress: Callable[[int, float], None] | None,
) -> None:
    """Teach `forward(inputs[i])` to be `targets[i]`; only `parameters` change."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE, betas=(0.9, 0.99))
    warmup = max(1, len(steps) // 20)
    for i, step in enumerate(steps):
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * min((i + 1) / warmup, 1 - i / len(steps))
        chosen = torch.randint(len(inputs), (_BATCH_SIZE,), generator=generator)
        output, target = forward(inputs[chosen]), targets[chosen]
        loss = functional.mse_loss(output, target) + 0.1 * functional.l1_loss(output, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if progress is not None:
            progress(step + 1, loss.item())
    for parameter in parameters:
        parameter.requires_grad_(False)


@torch.no_grad()
def _set_codebook(model: VQGAN, views: torch.Tensor, generator: torch.Generator) -> None:
    """Put the codes at the k-means centres of the latents, and the projection at the nearest code's argmax."""
    latents = torch.cat([model.latents(batch) for batch in views.split(_EVALUATION_BATCH)])
    points = latents.permute(0, 2, 3, 1).flatten(0, 2)
    centres = _kmeans(points, model.num_codes, generator)
    model.quantize.codebook.copy_(centres)
    # -|z - e|² = 2 z·e - |e|² + a term that is the same for every code
    model.get_parameter("quantize.proj.weight").copy_(2 * centres[:, :, None, None])
    model.get_parameter("quantize.proj.bias").copy_(-centres.square().sum(dim=1))


@torch.no_grad()
def _codes(model: VQGAN, views: torch.Tensor) -> torch.Tensor:
    """Codebook rows of the images, [n, embed_dim, R/8, R/8]."""
    indices = torch.cat([model.encode(batch) for batch in views.split(_EVALUATION_BATCH)])
    return model.codes(indices)


def _kmeans(points: torch.Tensor, num_centres: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm from k-means++ seeds; a centre that loses all points moves to a random point."""
    nearest = torch.full((len(points),), float("inf"))
    chosen = int(torch.randint(len(points), (1,), generator=generator))
    seeds = []
    for _ in range(num_centres):
        seeds.append(chosen)
        nearest = torch.minimum(nearest, (points - points[chosen]).square().sum(dim=1))
        chosen = int(torch.multinomial(nearest + 1e-12, 1, generator=generator))
    centres = points[seeds]
    for _ in range(_KMEANS_ROUNDS):
        owner = torch.cdist(points, centres).argmin(dim=1)
        counts = torch.bincount(owner, minlength=num_centres)
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        spare = points[torch.randint(len(points), (num_centres,), generator=generator)]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), spare)
    return centres


@torch.no_grad()
def _evaluate(model: VQGAN, pixels: torch.Tensor) -> dict[str, float]:
    indices = torch.cat([model.encode(batch) for batch in pixels.split(_EVALUATION_BATCH)])
    drawn = torch.cat([model.decode(batch) for batch in indices.split(_EVALUATION_BATCH)])
    error = ((drawn - pixels) / 2).square().mean()
    return {"psnr": float(-10 * torch.log10(error)), "codes_used": len(indices.unique())}


def _model_yaml(config: VQGANConfig) -> dict[str, Any]:
    autoencoder = dataclasses.asdict(config.ddconfig)
    autoencoder |= {name: list(autoencoder[name]) for name in ("ch_mult", "attn_resolutions")}
    params = {"embed_dim": config.embed_dim, "n_embed": config.n_embed, "ddconfig": autoencoder}
    return {"model": {"target": config.target, "params": params}}
