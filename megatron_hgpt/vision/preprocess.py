"""From a file or its bytes to the input of the CLIP tower (HealthGPT release: `expand2square` and CLIPImageProcessor).

Image files are untrusted: size and aspect are checked before pixels are decoded, only well-known formats are tried, and
whatever is wrong with one file becomes a `SkipSample` that the caller counts. Nothing here takes memory in proportion
to the square of a side: windowing and padding go by strips of rows.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from megatron_hgpt.errors import SkipSample

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
"""Pillow formats that are tried; the others (EPS runs a program, PDF, …) never reach their decoder."""
MAX_PIXELS = 64 * 1024 * 1024
"""Width times height of the largest image that is decoded."""
MAX_SIDE = 16 * 1024
"""Pixels of the longest side that is decoded: padding to a square takes time in proportion to its square."""
MAX_ASPECT = 32
"""Longer over shorter side at most: the tower would see a thinner image as a few rows."""
_STRIP_PIXELS = 1 << 20
"""Pixels that windowing and padding handle at a time."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PADDING_COLOUR = tuple(int(255 * mean) for mean in CLIP_MEAN)
"""(122, 116, 104): what surrounds an image that is not square."""


def load_image(source: Path | str | bytes | Image.Image) -> Image.Image:
    """Read one image as 8-bit RGB, turned as its EXIF orientation says.

    Greyscale of more than 8 bits is windowed from its minimum to its maximum; transparency is dropped; of several
    frames the first one counts.

    Args:
        source: a path, the content of a file, or an image that Pillow has opened.

    Raises:
        SkipSample: `missing_image`, `image_too_large`, `image_too_elongated`, `truncated_image`, `unreadable_image` or
            `out_of_memory`.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "an opened image", in_place=False)
    name = "bytes" if isinstance(source, bytes) else str(source)
    try:
        opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except FileNotFoundError as error:
        raise SkipSample("missing_image", "the image does not exist", name) from error
    except Exception as error:  # Pillow's plugins answer a damaged header with nearly every built-in exception
        raise _skip(error, name) from error
    with opened:
        return _decode(opened, name, in_place=True)


def shrink(image: Image.Image, max_side: int) -> Image.Image:
    """The picture with its longer side at most `max_side` pixels (aspect kept, LANCZOS); 0 leaves it as it is.

    Datasets and inference share it (`data.max_image_side`): the tower then sees the same pixels in both.
    """
    if not max_side or max(image.size) <= max_side:
        return image
    smaller = image.copy()
    smaller.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return smaller


def clip_preprocess(image: Image.Image, image_size: int) -> torch.Tensor:
    """Pad to a square, resize (bicubic) and normalise as CLIP does.

    Args:
        image: RGB, any size.
        image_size: side of the tower's input, pixels.

    Returns:
        float32 [3, image_size, image_size].
    """
    # The shortest edge of a square is both edges, so CLIP's centre crop that follows keeps every pixel.
    image = _squared(image, image_size)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels - mean) / std).contiguous()


def _squared(image: Image.Image, size: int) -> Image.Image:
    """The image padded to a square and resized to `size`, without the square.

    Pillow resizes rows first and columns then, with 8 bits in between; done one after the other on strips of rows, that
    gives the same pixels. Rows of padding alone stay the padding's colour.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), PADDING_COLOUR)
    for start, stop in _strips(side, image.height):
        strip = Image.new("RGB", (side, stop - start), PADDING_COLOUR)
        strip.paste(image.crop((0, start, image.width, stop)), (left, 0))
        narrow.paste(strip.resize((size, stop - start), Image.Resampling.BICUBIC), (0, top + start))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


def _strips(width: int, height: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of rows that have some `_STRIP_PIXELS` together."""
    rows = max(1, _STRIP_PIXELS // width)
    return ((start, min(start + rows, height)) for start in range(0, height, rows))


def _decode(image: Image.Image, name: str, *, in_place: bool) -> Image.Image:
    """`in_place` turns the image itself, which saves a copy."""
    width, height = image.size
    if not width or not height:
        raise SkipSample("unreadable_image", f"{width} x {height} pixels", name)
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        limit = f"the limit is {MAX_PIXELS} in all and {MAX_SIDE} a side"
        raise SkipSample("image_too_large", f"{width} x {height} pixels; {limit}", name)
    if max(width, height) > MAX_ASPECT * min(width, height):
        detail = f"{width} x {height} pixels; one side may be {MAX_ASPECT} times the other"
        raise SkipSample("image_too_elongated", detail, name)
    try:
        image.load()
        if in_place:
            ImageOps.exif_transpose(image, in_place=True)
        else:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            return _window(image).convert("RGB")
        if image.mode == "P":
            image = image.convert("RGBA")  # Pillow warns about transparent palettes on the direct way to RGB
        return image.convert("RGB")
    except Exception as error:  # as above, for the pixels
        raise _skip(error, name) from error


def _window(image: Image.Image) -> Image.Image:
    """Stretch [minimum, maximum] of the finite values to [0, 255]; a constant image becomes black."""
    low, high = np.inf, -np.inf
    for values in _rows_of(image):
        finite = values[np.isfinite(values)]
        low, high = min(low, finite.min(initial=np.inf)), max(high, finite.max(initial=-np.inf))
    if low > high:
        raise ValueError("no finite pixel")
    factor, windowed, top = 255 / (high - low) if high > low else 0.0, Image.new("L", image.size), 0
    for values in _rows_of(image):
        scaled = (np.nan_to_num(values, nan=low).clip(low, high) - low) * factor
        windowed.paste(Image.fromarray(np.round(scaled).astype(np.uint8)), (0, top))
        top += len(values)
    return windowed


def _rows_of(image: Image.Image) -> Iterator[NDArray[np.float64]]:
    """Strips of rows as [rows, width], from top to bottom."""
    for start, stop in _strips(*image.size):
        yield np.asarray(image.crop((0, start, image.width, stop)), dtype=np.float64)


def _skip(error: Exception, name: str) -> SkipSample:
    """Pillow's own words may hold the file's name and content: they are quoted."""
    detail, quote = f"Pillow raised {type(error).__name__}", f"{name}: {error}"
    if isinstance(error, UnidentifiedImageError):
        return SkipSample("unreadable_image", f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file", name)
    if isinstance(error, MemoryError):
        return SkipSample("out_of_memory", "no memory to decode it; fewer threads need less", name)
    if isinstance(error, Image.DecompressionBombError):
        return SkipSample("image_too_large", detail, quote)
    truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
    return SkipSample("truncated_image" if truncated else "unreadable_image", detail, quote)
