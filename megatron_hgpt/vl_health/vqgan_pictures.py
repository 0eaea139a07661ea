"""A small VQGAN of a user's own pictures: which files there are, which of them can be read, how well it draws new ones.

The published models bring an image tokenizer that was trained on millions of pictures; this one is for pictures that
look like nothing in it, and for trying the whole pipeline without it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from megatron_hgpt.errors import DataError, SkipSample
from megatron_hgpt.vision.preprocess import load_image
from megatron_hgpt.vision.vqgan import VQGAN
from megatron_hgpt.vision.vqgan_training import check_settings, train_vqgan
from megatron_hgpt.vl_health.llava_json import input_pictures, read_records, require_record, resolve_picture

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
"""What counts as a picture in a folder."""
HOLD_OUT_PERIOD = 10
"""Every tenth picture is held out and measured."""
_PROGRESS_INTERVAL_S = 10.0


@dataclass(kw_only=True, slots=True)
class Pictures:
    """The pictures that could be read."""

    images: list[Image.Image] = field(default_factory=list)
    """RGB, resolution x resolution."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason -> files."""


class _Skips:
    """Counts what cannot be used by reason, and logs the first of each reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, error: SkipSample) -> None:
        if not self.counts[error.reason]:
            logger.warning("skipped %s (further ones are counted)", error)
        self.counts[error.reason] += 1


def picture_files(sources: Iterable[Path], image_root: Path | None = None) -> tuple[list[Path], Counter[str]]:
    """Every picture of the sources once, sorted, and how many names in records are of no picture, by reason.

    Args:
        sources: folders (searched to any depth) and records files (pictures and ``target_image`` of each record, by
            the rules of `llava_json.resolve_picture`).
        image_root: folder that the records' paths are relative to; None takes that of the records file.

    Raises:
        DataError: a source does not exist, is no records file, or the sources name no picture at all.
    """
    sources = list(sources)
    files: set[Path] = set()
    skips = _Skips()
    for source in sources:
        if source.is_dir():
            files |= {path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES}
        elif source.is_file():
            files |= set(_pictures_of_records(source, image_root or source.parent, skips))
        else:
            raise DataError(f"{source} does not exist; name a folder of pictures or a JSON file of records")
    if not files:
        raise DataError(
            f"no picture in {', '.join(map(str, sources))}: looked for {', '.join(sorted(SUFFIXES))} in folders, for "
            f"image and target_image in records (skipped: {dict(skips.counts) or 'none'})"
        )
    return sorted(files), skips.counts


def _pictures_of_records(file: Path, image_root: Path, skips: _Skips) -> Iterator[Path]:
    """Pictures by the rules that preprocessing has for them; the rest of a record may be anything."""
    for record in read_records(file):
        try:
            require_record(record)
        except SkipSample as error:
            skips.add(error)
            continue
        target = record.get("target_image")
        for item in [*input_pictures(record), *([] if target is None else [target])]:
            try:
                picture = resolve_picture(item, image_root)
            except SkipSample as error:
                skips.add(error)
                continue
            if isinstance(picture, Path):  # JSON holds no bytes
                yield picture


def read_pictures(files: Sequence[Path], resolution: int) -> Pictures:
    """Read and resize; what cannot be read is counted by reason and the first of each reason is logged.

    Raises:
        DataError: no file can be read.
    """
    pictures, skips = Pictures(), _Skips()
    for file in files:
        try:
            image = load_image(file)
        except SkipSample as error:
            skips.add(error)
            continue
        pictures.images.append(image.resize((resolution, resolution), Image.Resampling.LANCZOS))
    pictures.skipped = skips.counts
    if not pictures.images:
        raise DataError(f"none of {len(files)} pictures can be read ({dict(pictures.skipped)}); first: {files[0]}")
    return pictures


def train_on_pictures(
    sources: Iterable[Path],
    output: Path,
    *,
    resolution: int = 64,
    num_codes: int = 256,
    num_steps: int = 500,
    seed: int = 0,
    image_root: Path | None = None,
) -> dict[str, float]:
    """Train on nine pictures of ten and measure on the tenth; `output` gets model.yaml and last.ckpt.

    Args:
        sources, image_root: as in `picture_files`.
        output: must not exist yet, or be empty.
        resolution: side in pixels, a multiple of 8; an image becomes (resolution / 8)² indices.

    Returns:
        num_pictures, num_held_out, num_skipped, psnr and held_out_psnr (dB; NaN where fewer than ten pictures leave
        none to hold out), codes_used, seconds.

    Raises:
        ConfigError: a number is out of its range.
        DataError: no readable pictures, fewer latents than codes, or `output` is in use.
    """
    check_settings(output, resolution=resolution, num_codes=num_codes, num_steps=num_steps)
    files, unnamed = picture_files(sources, image_root)
    pictures = read_pictures(files, resolution)
    held_out = pictures.images[HOLD_OUT_PERIOD - 1 :: HOLD_OUT_PERIOD]
    train = [image for i, image in enumerate(pictures.images) if i % HOLD_OUT_PERIOD != HOLD_OUT_PERIOD - 1]
    num_skipped = pictures.skipped.total() + unnamed.total()
    logger.info("%d pictures to train on, %d held out, %d skipped", len(train), len(held_out), num_skipped)
    result = train_vqgan(
        train,
        output,
        resolution=resolution,
        num_codes=num_codes,
        num_steps=num_steps,
        seed=seed,
        progress=Progress(num_steps, logger.info),
    )
    held_out_psnr = round_trip_psnr(VQGAN.load(output), held_out) if held_out else float("nan")
    return {
        "num_pictures": len(train),
        "num_held_out": len(held_out),
        "num_skipped": num_skipped,
        "held_out_psnr": held_out_psnr,
        **result,
    }


def round_trip_psnr(vqgan: VQGAN, images: Sequence[Image.Image]) -> float:
    """PSNR in dB of the images against their own encoding, over all of them together."""
    total = 0.0
    with torch.inference_mode():
        for image in images:
            pixels = vqgan.preprocess(image)[None]
            total += float(((vqgan.decode(vqgan.encode(pixels)) - pixels) / 2).square().mean())
    return float(-10 * torch.log10(torch.tensor(total / len(images))))


class Progress:
    """Writes the step, the loss and the time left, every few seconds and at the end; called after each step.

    Args:
        num_steps: steps in all.
        write: takes one line.
    """

    def __init__(self, num_steps: int, write: Callable[[str], None]) -> None:
        self.num_steps, self.write, self.start = num_steps, write, time.monotonic()
        self.last = self.start

    def __call__(self, step: int, loss: float) -> None:
        """`step` counts from 1."""
        now = time.monotonic()
        if now - self.last < _PROGRESS_INTERVAL_S and step < self.num_steps:
            return
        self.last = now
        left_s = (now - self.start) / step * (self.num_steps - step)
        self.write(f"step {step}/{self.num_steps}: loss {loss:.4f}, {left_s:.0f} s left")
