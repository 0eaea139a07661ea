"""Training a small VQGAN from scratch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_hgpt.errors import ConfigError, DataError
from megatron_hgpt.vision.vqgan import VQGAN
from megatron_hgpt.vision.vqgan_training import train_vqgan


def _ramps(n: int) -> list[Image.Image]:
    """Smooth 16 x 16 gradients of different direction and brightness."""
    rows, columns = np.mgrid[0:16, 0:16] / 15
    images = []
    for i in range(n):
        angle = 2 * np.pi * i / n
        values = 0.5 + 0.4 * (np.cos(angle) * (rows - 0.5) + np.sin(angle) * (columns - 0.5))
        images.append(Image.fromarray((255 * np.stack([values, values * 0.8, values * 0.6], -1)).astype(np.uint8)))
    return images


def test_training_draws_its_images_and_writes_a_loadable_folder(tmp_path: Path) -> None:
    images, steps = _ramps(8), []
    result = train_vqgan(
        images,
        tmp_path / "sub" / "vqgan",
        resolution=16,
        num_codes=16,
        num_steps=40,
        progress=lambda step, loss: steps.append((step, loss)),
    )
    assert [step for step, _ in steps] == list(range(1, 41))
    model = VQGAN.load(tmp_path / "sub" / "vqgan")
    assert (model.resolution, model.num_codes, model.num_indices) == (16, 16, 4)
    pixels = torch.stack([model.preprocess(image) for image in images])
    indices = model.encode(pixels)
    error = ((model.decode(indices) - pixels) / 2).square().mean()
    # Reported and recomputed from the files; float32 in other batches.
    assert result["psnr"] == pytest.approx(float(-10 * torch.log10(error)), abs=0.01)
    assert result["codes_used"] == len(indices.unique()) > 8
    mean_error = ((pixels.mean(dim=(0, 2, 3), keepdim=True) - pixels) / 2).square().mean()
    # Better than the mean colour by 3 dB, half of the error: the indices say which image it is.
    assert result["psnr"] > -10 * torch.log10(mean_error) + 3
    # The projection is the nearest neighbour among the codes.
    latents = model.latents(pixels).permute(0, 2, 3, 1).reshape(8, 4, -1)
    assert torch.equal(indices, torch.cdist(latents.double(), model.quantize.codebook.double()).argmin(dim=2))


def test_the_same_seed_gives_the_same_weights_and_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_vqgan(_ramps(4), tmp_path / name, resolution=16, num_codes=8, num_steps=3, seed=seed)
        states.append(VQGAN.load(tmp_path / name).state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["decoder.conv_in.weight"], states[2]["decoder.conv_in.weight"])


def test_a_folder_in_use_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "vqgan"
    target.mkdir()
    (target / "last.ckpt").write_bytes(b"mine")
    with pytest.raises(DataError, match="is not empty"):
        train_vqgan(_ramps(4), target, resolution=16, num_codes=8, num_steps=2)
    assert (target / "last.ckpt").read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [target]


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resolution=20"):
        train_vqgan(_ramps(1), tmp_path / "v", resolution=20, num_steps=2)
    with pytest.raises(ConfigError, match="num_steps=1"):
        train_vqgan(_ramps(1), tmp_path / "v", resolution=16, num_steps=1)
    with pytest.raises(DataError, match="num_codes=256"):
        train_vqgan(_ramps(1), tmp_path / "v", resolution=16, num_steps=2)
    assert not (tmp_path / "v").exists()
