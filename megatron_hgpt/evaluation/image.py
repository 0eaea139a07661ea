"""Scoring of drawn images: SSIM, PSNR and MSE on 8-bit RGB values, per image, then averaged over images.

SSIM is that of Wang et al. (2004): 11 x 11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03, range 255, without the
5-pixel border, averaged over pixels and channels. PSNR is 10 log10(255^2 / MSE) in dB. Identical images have an
infinite PSNR; it is capped at 100 dB so that means and JSON stay finite (an MSE of 6.5e-6: about one grey level in
one channel of one pixel at 256 x 256). LPIPS is not computed: it needs the weights of a pretrained network.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from megatron_hgpt.errors import DataError
from megatron_hgpt.evaluation.results import ImageResult

MAX_PSNR_DB = 100.0
"""Stands for the infinite PSNR of two identical images."""

MIN_SIDE_PIXELS = 11
"""Side of the SSIM window: no smaller image can be scored."""


def image_metrics(image: Image.Image, reference: Image.Image) -> dict[str, float]:
    """Metrics of one image against its reference; both are read as 8-bit RGB.

    Returns:
        ssim (-1 … 1), psnr_db (0 … 100), mse (squared 8-bit values, 0 … 65025).

    Raises:
        DataError: the sizes differ or are below 11 pixels; the caller decides how to resize, since it changes scores.
    """
    from skimage.metrics import structural_similarity

    if image.size != reference.size or min(image.size) < MIN_SIDE_PIXELS:
        raise DataError(
            f"cannot compare an image of {image.size} pixels with a reference of {reference.size}: "
            f"both need one size of at least {MIN_SIDE_PIXELS} x {MIN_SIDE_PIXELS}; resize the reference first"
        )
    a, b = (np.asarray(x.convert("RGB"), dtype=np.float64) for x in (image, reference))
    mse = float(np.mean((a - b) ** 2))
    psnr_db = min(MAX_PSNR_DB, 10 * math.log10(255.0**2 / mse)) if mse else MAX_PSNR_DB
    ssim = structural_similarity(
        a, b, data_range=255.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return {"ssim": float(ssim), "psnr_db": psnr_db, "mse": mse}


def mean_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """Mean of each metric over images; None for no images."""
    if not metrics:
        return None
    return {name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}


def summarise_images(results: Sequence[ImageResult]) -> dict[str, Any]:
    """What the model loses, and how much of it the VQGAN loses already; JSON-safe.

    Returns:
        num_images; output_vs_target, round_trip_vs_target and output_vs_round_trip, each the means of
        `image_metrics`; psnr_gap_db = PSNR(round trip, target) - PSNR(output, target), means over images, positive
        where the model is worse than its own image tokenizer; by_kind with the same keys per kind of drawing task.
    """
    return {**_summarise(results), "by_kind": {k: _summarise(v) for k, v in sorted(_by_kind(results).items())}}


def _summarise(results: Sequence[ImageResult]) -> dict[str, Any]:
    output = mean_metrics([image_metrics(r.output, r.target) for r in results])
    round_trip = mean_metrics([image_metrics(r.round_trip, r.target) for r in results])
    return {
        "num_images": len(results),
        "output_vs_target": output,
        "round_trip_vs_target": round_trip,
        "output_vs_round_trip": mean_metrics([image_metrics(r.output, r.round_trip) for r in results]),
        "psnr_gap_db": round_trip["psnr_db"] - output["psnr_db"] if round_trip and output else None,
    }


def _by_kind(results: Sequence[ImageResult]) -> dict[str, list[ImageResult]]:
    kinds: dict[str, list[ImageResult]] = defaultdict(list)
    for result in results:
        kinds[result.kind or "unspecified"].append(result)
    return kinds
