"""Pictures made to hurt: each is decoded or skipped with a reason, within the memory that docs/data.md states."""

from __future__ import annotations

import io
import random
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_hgpt.errors import SkipSample
from megatron_hgpt.vision.preprocess import FORMATS, MAX_SIDE, clip_preprocess, load_image

SIDE = 336
SMALL_MIB, WEBP_MIB, OTHER_MIB = 200, 1100, 720
"""Bounds on what decoding and preprocessing one picture adds: of these files, and of the largest that are decoded."""


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes, pixels: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    """A PNG by hand: its header may say anything."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width: int, height: int, *tags: tuple[int, int, int, int]) -> bytes:
    """A little-endian TIFF of one directory; a tag is (number, type, count, value)."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    merged = sorted({entry[0]: entry for entry in [*entries, *tags]}.values())
    body = b"".join(struct.pack("<HHII", *entry) for entry in merged)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(merged)) + body + struct.pack("<I", 8)


def bombs() -> Iterator[bytes]:
    """Small files that announce, or unpack to, much."""
    for width, height in ((1, 40_000), (40_000, 1), (1, 90_000), (2**31 - 1, 1), (100_000, 100_000), (1, 1000), (0, 9)):
        yield png(width, height, pixels=bytes(2 * min(height, 10**5)))
    for size in (10, 10**6):
        yield png(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(size * 300))), pixels=bytes(65 * 64))
        yield png(64, 64, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(size * 300))), pixels=bytes(65 * 64))
        yield png(64, 64, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(size * 300))))
    yield png(64, 64, pixels=bytes(10**8))  # pixels without end
    yield png(64, 64, chunk(b"acTL", struct.pack(">II", 2**30, 0)), pixels=bytes(65 * 64))
    yield png(2000, 2000, colour=7), png(8, 8, depth=3)
    for tags in (
        [(322, 4, 1, 2**30), (323, 4, 1, 2**30), (324, 4, 1, 8)],  # a tile
        [(277, 3, 1, 60_000)],  # samples a pixel
        [(278, 4, 1, 2**31)],  # rows a strip
        [(273, 4, 2**30, 8)],  # strips
        [(259, 3, 1, 5), (279, 4, 1, 2**31)],  # LZW bytes
        [(270, 2, 2**31, 8)],  # a description
        [(34675, 7, 2**30, 8)],  # a profile
    ):
        yield tiff(64, 64, *tags)
    yield tiff(2**31, 2**31)
    for image_format in ("BMP", "JPEG", "WEBP"):
        data = bytearray(encoded(Image.new("RGB", (16, 16)), image_format))
        place = {"BMP": 18, "JPEG": data.find(b"\xff\xc0") + 5, "WEBP": 26}[image_format]
        data[place : place + 4] = b"\xff\xff\xff\x3f" if image_format != "BMP" else struct.pack("<I", 2**31 - 1)
        yield bytes(data)
    yield encoded(Image.new("RGB", (16, 16)), "GIF"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n"
    frames = [Image.new("RGB", (200, 200), (i, 0, 0)) for i in range(50)]
    yield encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    yield encoded(Image.fromarray(np.full((40, 30), np.nan, np.float32)), "TIFF")


def broken(count: int, seed: int = 0) -> Iterator[bytes]:
    """Files of every format, cut, with bytes changed, repeated and put in."""
    chance = random.Random(seed)
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 200
    originals = [encoded(noise, image_format, exif=exif) for image_format in FORMATS if image_format != "BMP"]
    originals += [encoded(noise.convert(mode), "PNG") for mode in ("1", "L", "P", "RGBA")]
    originals += [encoded(noise.convert(mode), "TIFF") for mode in ("F", "I", "CMYK", "L")]
    originals.append(encoded(Image.fromarray(np.asarray(noise.convert("L")).astype(np.uint16) * 99), "PNG"))
    originals += [encoded(noise, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    originals += [encoded(noise, "BMP"), encoded(noise, "JPEG", progressive=True)]
    for _ in range(count):
        data = bytearray(chance.choice(originals))
        for _ in range(chance.choice((1, 1, 4, 30))):
            place = chance.randrange(min(len(data), chance.choice((64, 256, len(data)))))
            what = chance.randrange(4)
            if what == 0:
                data[place] = chance.randrange(256)
            elif what == 1:
                data[place : place + 4] = chance.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
            elif what == 2:
                del data[place : place + chance.choice((1, 4, len(data) // 2))]
            else:
                data[place:place] = data[: chance.choice((1, 8, 200))]
            data = data or bytearray(b"\0")
        yield bytes(data)


def memory_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise LookupError(key)


def peak_mib(function: Callable[[], object]) -> float:
    """How far above its start this process's memory rises in a call."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark again
    except OSError:
        pytest.skip("this system does not start the high-water mark of a process again")
    start = memory_mib("VmRSS")
    function()
    return memory_mib("VmHWM") - start


def use(data: bytes, outcomes: Counter[str]) -> None:
    """What training does with a stored picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
            pixels = clip_preprocess(load_image(data), SIDE)
        assert pixels.shape == (3, SIDE, SIDE)
        outcomes["decoded"] += 1
    except SkipSample as error:
        outcomes[error.reason] += 1


def check(files: list[bytes]) -> tuple[Counter[str], float]:
    outcomes: Counter[str] = Counter()
    use(encoded(Image.new("RGB", (8, 8)), "PNG"), Counter())  # what is loaded once
    peak = max(peak_mib(lambda data=data: use(data, outcomes)) for data in files)  # type: ignore[misc]
    assert sum(outcomes.values()) == len(files)
    assert peak < SMALL_MIB
    return outcomes, peak


def flat(files: Iterator[bytes | tuple[bytes, ...]]) -> list[bytes]:
    return [data for item in files for data in (item if isinstance(item, tuple) else (item,))]


def test_bombs_and_broken_files_are_skips() -> None:
    outcomes, _ = check([*flat(bombs()), *broken(60)])
    assert outcomes["image_too_large"] >= 8 and outcomes["image_too_elongated"] == 1
    assert outcomes["decoded"] and outcomes["truncated_image"] and outcomes["unreadable_image"]


@pytest.mark.slow
def test_three_hundred_hostile_images(capsys: pytest.CaptureFixture[str]) -> None:
    special = flat(bombs())
    files = [*special, *broken(300 - len(special), seed=1)]
    outcomes, peak = check(files)
    with capsys.disabled():
        sys.stdout.write(f"\n{len(files)} hostile images: {dict(outcomes)}; at most {peak:.0f} MiB above the start\n")


@pytest.mark.parametrize(("width", "height"), [(40, 40), (97, 41), (41, 97), (3, 96), (96, 3), (700, 641), (1, 30)])
@pytest.mark.parametrize("strip_pixels", [1, 500, 1 << 20])
def test_padding_by_strips_gives_the_pixels_of_the_padded_square(
    monkeypatch: pytest.MonkeyPatch, width: int, height: int, strip_pixels: int
) -> None:
    monkeypatch.setattr("megatron_hgpt.vision.preprocess._STRIP_PIXELS", strip_pixels)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, side = Image.fromarray(pixels), max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    for size in (16, 64):
        assert clip_preprocess(image, size).equal(clip_preprocess(square, size))
        resized = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        mean, std = np.float32((0.48145466, 0.4578275, 0.40821073)), np.float32((0.26862954, 0.26130258, 0.27577711))
        expected = ((resized / 255 - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(clip_preprocess(image, size).numpy(), expected, rtol=0, atol=1e-6)


def test_a_long_picture_takes_memory_by_its_pixels() -> None:
    image = Image.new("RGB", (MAX_SIDE // 32, MAX_SIDE))
    assert peak_mib(lambda: clip_preprocess(image, 48)) < 32  # the square would be 1 GiB


@pytest.mark.slow
def test_the_largest_pictures_stay_within_what_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    grey = Image.linear_gradient("L").resize((8192, 8192))
    colour = Image.merge("RGB", (grey, grey.rotate(90), grey))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "PNG, colour": encoded(colour, "PNG", compress_level=1),
        "PNG, palette": encoded(grey.convert("P"), "PNG", compress_level=1, transparency=b"\0\x80"),
        "PNG, 16 bits": encoded(Image.fromarray(np.arange(1 << 26, dtype=np.uint16).reshape(8192, 8192)), "PNG"),
        "JPEG, progressive": encoded(colour, "JPEG", progressive=True, subsampling=0),
        "JPEG, turned": encoded(colour, "JPEG", exif=exif),
        "TIFF, float": encoded(grey.convert("F"), "TIFF"),
        "TIFF, deflate": encoded(colour, "TIFF", compression="tiff_adobe_deflate"),
        "WEBP": encoded(colour, "WEBP", quality=1, method=0),
        "PNG, 12 megapixels": encoded(colour.resize((4000, 3000)), "PNG"),
    }
    lines = []
    for name, data in files.items():
        outcomes: Counter[str] = Counter()
        peak = peak_mib(lambda data=data, outcomes=outcomes: use(data, outcomes))  # type: ignore[misc]
        lines.append(f"{name}: {peak:.0f} MiB")
        assert outcomes == {"decoded": 1}
        assert peak < (WEBP_MIB if name == "WEBP" else OTHER_MIB), lines[-1]
    with capsys.disabled():
        sys.stdout.write("\none decoding thread, 64 Mi pixels (8192 x 8192): " + ", ".join(lines) + "\n")
