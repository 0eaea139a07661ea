from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_hgpt.errors import DataError
from megatron_hgpt.evaluation.image import MAX_PSNR_DB, image_metrics, mean_metrics, summarise_images
from megatron_hgpt.evaluation.results import ImageResult


def _noise(seed: int, size: int = 48) -> Image.Image:
    generator = np.random.default_rng(seed)
    smooth = np.add.outer(np.linspace(0, 120, size), np.linspace(0, 80, size))[..., None]
    return Image.fromarray((smooth + generator.integers(0, 50, (size, size, 3))).astype(np.uint8))


def _constant(value: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (value, value, value))


def _result(target: int, round_trip: int, output: int, kind: str = "") -> ImageResult:
    return ImageResult(
        sample_id="s",
        instruction="draw",
        input=None,
        target=_constant(target),
        round_trip=_constant(round_trip),
        output=_constant(output),
        kind=kind,
    )


def test_mse_and_psnr_by_hand() -> None:
    metrics = image_metrics(_constant(110), _constant(100))
    assert metrics["mse"] == 100.0
    assert metrics["psnr_db"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-12)
    # Constant images have no variance: SSIM is its luminance term alone.
    c1 = (0.01 * 255) ** 2
    assert metrics["ssim"] == pytest.approx((2 * 110 * 100 + c1) / (110**2 + 100**2 + c1), abs=1e-9)


def test_one_grey_level_in_one_channel_of_one_pixel() -> None:
    changed = _constant(100)
    changed.putpixel((3, 4), (101, 100, 100))
    metrics = image_metrics(changed, _constant(100))
    assert metrics["mse"] == pytest.approx(1 / (16 * 16 * 3))
    assert metrics["psnr_db"] < MAX_PSNR_DB


def test_identical_images_are_capped() -> None:
    assert image_metrics(_noise(0), _noise(0)) == {"ssim": pytest.approx(1.0), "psnr_db": MAX_PSNR_DB, "mse": 0.0}


def test_grey_and_rgb_of_one_picture_are_equal() -> None:
    grey = _noise(0).convert("L")
    assert image_metrics(grey, grey.convert("RGB"))["mse"] == 0.0


def test_agrees_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    for seed in range(3):
        a, b = _noise(seed), _noise(seed + 10)
        x, y = (torch.from_numpy(np.asarray(i, dtype=np.float64)).permute(2, 0, 1)[None] for i in (a, b))
        ours = image_metrics(a, b)
        # torchmetrics averages over reflected borders too; Wang et al. and scikit-image leave 5 pixels out.
        _, ssim_map = functional.structural_similarity_index_measure(
            x, y, data_range=255.0, sigma=1.5, kernel_size=11, return_full_image=True
        )
        ssim = ssim_map[..., 5:-5, 5:-5].mean()
        psnr = functional.peak_signal_noise_ratio(x, y, data_range=255.0)
        # The same formula, summed in another order: SSIM in fp64; torchmetrics takes the logarithm of PSNR in fp32.
        assert ours["ssim"] == pytest.approx(float(ssim), abs=1e-10)
        assert ours["psnr_db"] == pytest.approx(float(psnr), rel=1e-6)


@pytest.mark.parametrize("size", [(16, 17), (8, 8)])
def test_sizes_that_cannot_be_compared(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    with pytest.raises(DataError, match="resize the reference first"):
        image_metrics(image, image if size == (8, 8) else _constant(0))


def test_summary_by_hand() -> None:
    summary = summarise_images([_result(100, 105, 110, "reconstruction"), _result(100, 105, 105)])
    assert summary["num_images"] == 2
    assert summary["output_vs_target"]["mse"] == (100 + 25) / 2
    assert summary["round_trip_vs_target"]["mse"] == 25.0
    assert summary["output_vs_round_trip"]["mse"] == 12.5
    # The first image loses 20 log10(10 / 5) dB, the second nothing.
    assert summary["psnr_gap_db"] == pytest.approx(20 * math.log10(2) / 2)
    assert summary["by_kind"]["reconstruction"]["psnr_gap_db"] == pytest.approx(20 * math.log10(2))
    assert summary["by_kind"]["unspecified"]["psnr_gap_db"] == 0.0


def test_no_images_give_no_figures() -> None:
    assert mean_metrics([]) is None
    summary = summarise_images([])
    assert summary["num_images"] == 0 and summary["psnr_gap_db"] is None and summary["by_kind"] == {}
