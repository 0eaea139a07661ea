"""Reading untrusted images and CLIP's preprocessing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_hgpt.errors import SkipSample
from megatron_hgpt.vision import preprocess
from megatron_hgpt.vision.preprocess import clip_preprocess, load_image


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def _reason(source: Path | str | bytes | Image.Image) -> str:
    with pytest.raises(SkipSample) as caught:
        load_image(source)
    return caught.value.reason


def test_path_string_bytes_and_image_give_the_same_pixels(tmp_path: Path) -> None:
    image = _noise(7, 5)
    path = tmp_path / "a.png"
    path.write_bytes(_encoded(image, "PNG"))
    for source in (path, str(path), path.read_bytes(), image, Image.open(path)):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert loaded.tobytes() == image.tobytes()


@pytest.mark.parametrize("image_format", preprocess.FORMATS)
def test_every_listed_format_opens(image_format: str) -> None:
    assert load_image(_encoded(_noise(16, 16), image_format)).size == (16, 16)


def test_a_format_that_is_not_listed_is_refused() -> None:
    assert _reason(_encoded(_noise(8, 8), "PPM")) == "unreadable_image"


def test_missing_and_garbage(tmp_path: Path) -> None:
    assert _reason(tmp_path / "none.png") == "missing_image"
    assert _reason(tmp_path) == "unreadable_image"
    assert _reason(b"") == "unreadable_image"
    assert _reason(b"not an image at all") == "unreadable_image"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "BMP"])
def test_truncated(image_format: str) -> None:
    data = _encoded(_noise(64, 64), image_format)
    assert _reason(data[: len(data) // 2]) == "truncated_image"


def test_every_cut_of_a_file_is_a_skip_or_an_image() -> None:
    for image_format in preprocess.FORMATS:
        data = _encoded(_noise(24, 24), image_format)
        for length in range(0, len(data), max(1, len(data) // 60)):
            try:
                load_image(data[:length])
            except SkipSample:
                continue


def test_size_is_checked_before_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _encoded(_noise(20, 10), "PNG")
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 199)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert _reason(data) == "image_too_large"


def test_a_decompression_bomb_of_pillow_is_too_large() -> None:
    header = bytearray(_encoded(Image.new("L", (1, 1)), "BMP"))
    header[18:26] = (40_000).to_bytes(4, "little") * 2
    assert _reason(bytes(header)) == "image_too_large"


def test_16_bit_greyscale_is_windowed() -> None:
    values = np.array([[1000, 2000], [3000, 6100]], dtype=np.uint16)
    loaded = np.asarray(load_image(_encoded(Image.fromarray(values), "PNG")))
    expected = np.round((values - 1000.0) * 255 / 5100).astype(np.uint8)
    assert (loaded == expected[..., None]).all()


def test_float_greyscale_ignores_what_is_not_finite() -> None:
    values = np.array([[-1.0, np.nan, 1.0], [0.0, np.inf, -np.inf]], dtype=np.float32)
    loaded = np.asarray(load_image(Image.fromarray(values)))[..., 0]
    assert loaded.tolist() == [[0, 0, 255], [128, 255, 0]]
    assert _reason(Image.fromarray(np.full((2, 2), np.nan, np.float32))) == "unreadable_image"
    assert not np.asarray(load_image(Image.fromarray(np.full((2, 2), 7, np.float32)))).any()


def test_alpha_palette_and_bilevel_become_rgb() -> None:
    rgba = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    assert load_image(_encoded(rgba, "PNG")).getpixel((0, 0)) == (10, 20, 30)
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert load_image(_encoded(palette, "PNG", transparency=b"\x00\x80")).getpixel((1, 0)) == (9, 8, 7)
    assert load_image(_encoded(Image.new("1", (2, 1), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    image = _noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to view
    loaded = load_image(_encoded(image, "PNG", exif=exif))
    assert loaded.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (97, 40), (31, 80), (1, 200)])
def test_equals_transformers_after_padding(width: int, height: int) -> None:
    transformers = pytest.importorskip("transformers")
    image = _noise(width, height, seed=width)
    side = max(width, height)
    padded = Image.new("RGB", (side, side), (122, 116, 104))
    padded.paste(image, ((side - width) // 2, (side - height) // 2))
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, do_convert_rgb=True
    )
    expected = torch.as_tensor(np.asarray(processor(padded)["pixel_values"][0]))
    actual = clip_preprocess(image, 48)
    assert actual.dtype == torch.float32
    assert actual.shape == (3, 48, 48)
    # The same 8-bit pixels; float32 rounding in another order of division: a few ulp of values up to 2.2.
    torch.testing.assert_close(actual, expected.float(), atol=2e-6, rtol=0)


def test_padding_is_centred_with_a_floor_offset() -> None:
    pixels = clip_preprocess(Image.new("RGB", (4, 1), (255, 0, 0)), 4)
    mean, std = torch.tensor(preprocess.CLIP_MEAN), torch.tensor(preprocess.CLIP_STD)
    colours = (pixels[:, :, 0].T * std + mean) * 255
    grey = torch.tensor([122.0, 116.0, 104.0])
    expected = torch.stack([grey, torch.tensor([255.0, 0.0, 0.0]), grey, grey])  # (4 - 1) // 2 = 1 row above
    torch.testing.assert_close(colours, expected, atol=1e-3, rtol=0)  # float32 of values up to 255
