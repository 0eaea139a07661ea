"""From a file or its bytes to the input of the CLIP tower (HealthGPT release: `expand2square` and CLIPImageProcessor).

Image files are untrusted: the size is checked before pixels are decoded, only well-known formats are tried, and
whatever is wrong with one file becomes a `SkipSample` that the caller counts.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from megatron_hgpt.errors import SkipSample

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
"""Pillow formats that are tried; the others (EPS runs a program, PDF, …) never reach their decoder."""
MAX_PIXELS = 64 * 1024 * 1024
"""Width times height of the largest image that is decoded."""

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
        SkipSample: `missing_image`, `image_too_large`, `truncated_image` or `unreadable_image`.
    """
    name = str(source) if isinstance(source, (Path, str)) else f"<{type(source).__name__}>"
    if isinstance(source, Image.Image):
        return _decode(source, name)
    try:
        opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except FileNotFoundError as error:
        raise SkipSample("missing_image", f"{name} does not exist") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins answer a damaged header with nearly every built-in exception
        raise _skip(error, name) from error
    with opened:
        return _decode(opened, name)


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
    side = max(image.size)
    if image.size != (side, side):
        square = Image.new("RGB", (side, side), PADDING_COLOUR)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    # The shortest edge of a square is both edges, so CLIP's centre crop that follows keeps every pixel.
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels - mean) / std).contiguous()


def _decode(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise SkipSample("image_too_large", f"{name} has {width} x {height} pixels; the limit is {MAX_PIXELS} in all")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            return _window(image).convert("RGB")
        if image.mode == "P":
            image = image.convert("RGBA")  # Pillow warns about transparent palettes on the direct way to RGB
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # as above, for the pixels
        raise _skip(error, name) from error


def _window(image: Image.Image) -> Image.Image:
    """Stretch [minimum, maximum] of the finite values to [0, 255]; a constant image becomes black."""
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("no finite pixel")
    low, high = float(finite.min()), float(finite.max())
    scaled = (np.nan_to_num(values, nan=low).clip(low, high) - low) * (255 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.round(scaled).astype(np.uint8))


def _skip(error: Exception, name: str) -> SkipSample:
    detail = f"{name}: {error}"
    if isinstance(error, Image.DecompressionBombError):
        return SkipSample("image_too_large", detail)
    truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
    return SkipSample("truncated_image" if truncated else "unreadable_image", detail)
