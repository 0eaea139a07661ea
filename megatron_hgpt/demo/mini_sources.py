"""DICOM and colour pictures inside installed PyPI packages, with the facts that their metadata or documentation states.

Nothing is downloaded and nothing is copied but pixels: no DICOM tag, no EXIF, and ultrasound frames are cropped so that
text burnt into them stays out. Needs pydicom, nibabel and scikit-image (the ``demo`` extra). See also `mini_volumes`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_hgpt.errors import DataError
from megatron_hgpt.rounding import ceil_div

MIN_SIDE = 64
"""Shorter side in pixels below which a slice is enlarged (bicubic)."""
MAX_SIDE = 256
"""Longer side in pixels above which a picture is reduced (Lanczos)."""


@dataclass(kw_only=True, slots=True)
class Source:
    """One file of one package."""

    package: str
    file: str
    """Path inside the installed package."""
    licence: str
    description: str
    evidence: str
    """Where the facts come from."""


@dataclass(kw_only=True, slots=True)
class Picture:
    """One picture before it gets its name."""

    image: Image.Image
    """Mode RGB, 64 to 256 pixels a side (a strip may be shorter)."""
    source: Source
    series: str
    """Pictures of one series can be neighbours (slices of a volume in one plane, tiles, frames)."""
    position: int
    """Slice, tile or frame number within the series."""
    facts: dict[str, str] = field(default_factory=dict)
    """Attribute (modality, plane, body_part …) -> value."""
    native: bool = True
    """False where the picture was enlarged: it then holds no detail for super-resolution to restore."""
    region: str = ""
    """Box (left, top, right, bottom) in the source, or the slice index."""
    may_be_held_out: bool = True
    """False where another picture of the file shows the same pixels."""


def package_file(package: str, file: str) -> Path:
    """Path of `file` inside the installed `package`, without importing it.

    Raises:
        DataError: the package or the file is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"package {package!r} is not installed; pip install pydicom nibabel scikit-image")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise DataError(f"{path}: not in this version of {package}; install the version pinned by the demo extra")
    return path


def resized(image: Image.Image) -> tuple[Image.Image, bool]:
    """RGB within the size limits, and whether it kept its native detail (was not enlarged)."""
    image = image.convert("RGB")
    factor = 1.0
    if max(image.size) > MAX_SIDE:
        factor = MAX_SIDE / max(image.size)
    elif min(image.size) < MIN_SIDE:
        factor = min(float(ceil_div(MIN_SIDE, min(image.size))), MAX_SIDE / max(image.size))
    if factor == 1.0:
        return image, True
    size = (round(image.width * factor), round(image.height * factor))
    method = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC
    return image.resize(size, method), factor < 1


def to_uint8(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Window [low, high] to 0 … 255."""
    return (np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def _picture(pixels: np.ndarray, **fields: Any) -> Picture:
    image, native = resized(Image.fromarray(np.ascontiguousarray(pixels)))
    return Picture(image=image, native=native, **fields)


def _tiles(pixels: np.ndarray, boxes: list[tuple[int, int, int, int]], **fields: Any) -> list[Picture]:
    """One picture per box (left, top, right, bottom) of `pixels`."""
    return [
        _picture(pixels[top:bottom, left:right], position=index, region=f"{left},{top},{right},{bottom}", **fields)
        for index, (left, top, right, bottom) in enumerate(boxes)
    ]


def _grid(left: int, top: int, width: int, height: int, columns: int, rows: int) -> list[tuple[int, int, int, int]]:
    """Boxes of a grid without overlap, raster order."""
    return [
        (left + x * width, top + y * height, left + (x + 1) * width, top + (y + 1) * height)
        for y in range(rows)
        for x in range(columns)
    ]


# ---------------------------------------------------------------------------------------------------- DICOM


def _read_dicom(source: Source) -> Any:
    import pydicom

    return pydicom.dcmread(package_file(source.package, source.file))


def _dicom_grey(dataset: Any, window: tuple[float, float] | None = None) -> np.ndarray:
    """Pixels through the file's rescale and its first window (or `window` = centre, width), uint8 [h, w]."""

    def first(value: Any) -> float:
        return float(value if isinstance(value, (str, float, int)) else value[0])

    values = dataset.pixel_array * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    if window is None and "WindowCenter" in dataset:
        window = first(dataset.WindowCenter), first(dataset.WindowWidth)
    if window is None:  # neither the file nor the caller has one
        low, high = np.percentile(values, (0.5, 99.5))
    else:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    return to_uint8(values, float(low), float(high))


def _pydicom_source(file: str, description: str, evidence: str) -> Source:
    return Source(
        package="pydicom",
        file=f"data/test_files/{file}",
        licence="MIT (pydicom); public sample files, see data/test_files/README.txt",
        description=description,
        evidence=evidence,
    )


def dicom_pictures() -> list[Picture]:
    """CT, MR, ultrasound and nuclear medicine from pydicom and nibabel."""
    pictures: list[Picture] = []
    source = _pydicom_source(
        "CT_small.dcm", "CT slice, 128 x 128", "Modality CT, ImageOrientationPatient axial; soft-tissue window 40/400"
    )
    pictures.append(
        _picture(
            _dicom_grey(_read_dicom(source), (40, 400)),
            source=source,
            series="ct_small",
            position=0,
            facts={"modality": "CT", "plane": "axial"},
        )
    )
    source = _pydicom_source(
        "J2K_pixelrep_mismatch.dcm",
        "CT of the head, 512 x 512, gantry tilted by 22 degrees",
        "Modality CT, BodyPartExamined HEAD, ImageType AXIAL; the file's window 40/100",
    )
    pictures += _tiles(
        _dicom_grey(_read_dicom(source)),
        _grid(97, 70, 108, 130, 3, 3),
        source=source,
        series="ct_head",
        facts={"modality": "CT", "plane": "axial", "body_part": "head"},
    )
    source = _pydicom_source(
        "MR_small.dcm",
        "MR slice, 64 x 64",
        "Modality MR, ScanningSequence SE, ImageOrientationPatient axial; the file's window",
    )
    pictures.append(
        _picture(
            _dicom_grey(_read_dicom(source)),
            source=source,
            series="mr_small",
            position=0,
            facts={"modality": "MRI", "plane": "axial", "sequence": "spin echo"},
        )
    )
    source = _pydicom_source(
        "examples_overlay.dcm",
        "MR of the abdomen, 484 x 300",
        "Modality MR, BodyPartExamined ABDOMEN, ScanningSequence GR, ImageOrientationPatient axial; the file's window",
    )
    pictures += _tiles(
        _dicom_grey(_read_dicom(source)),
        _grid(32, 8, 140, 142, 3, 2),
        source=source,
        series="mr_abdomen",
        facts={"modality": "MRI", "plane": "axial", "body_part": "abdomen", "sequence": "gradient echo"},
    )
    source = Source(
        package="nibabel",
        file="nicom/tests/data/slicethickness_empty_string.dcm",
        licence="MIT (nibabel)",
        description="MR angiography, maximum intensity projection; only the rows that hold data",
        evidence="Modality MR, ProtocolName TOF_3D_multi-slab, ImageType PROJECTION IMAGE; the file's window",
    )
    pictures += _tiles(
        _dicom_grey(_read_dicom(source)),
        [(100, 154, 250, 231)],
        source=source,
        series="mr_angiography",
        facts={"modality": "MRI", "sequence": "time of flight"},
    )
    return pictures + _nuclear_pictures() + _ultrasound_pictures()


def _nuclear_pictures() -> list[Picture]:
    source = _pydicom_source(
        "JPEG2000.dcm",
        "nuclear medicine, whole-body bone scan, 256 x 1024",
        "Modality NM, BodyPartExamined WHOLE BODY, StudyDescription Whole Body Bone; no window in the file",
    )
    pixels = _dicom_grey(_read_dicom(source))
    facts = {"modality": "nuclear medicine", "study": "bone scan"}
    whole = [(0, 0, 256, 1024)]
    parts = [(0, 20, 256, 276), (0, 276, 256, 532), (0, 532, 256, 788)]
    common: dict[str, Any] = {"source": source, "may_be_held_out": False}
    return [
        *_tiles(pixels, whole, series="nm_whole", facts={**facts, "body_part": "whole body"}, **common),
        *_tiles(pixels, parts, series="nm_part", facts=facts, **common),
    ]


def _ultrasound_pictures() -> list[Picture]:
    source = _pydicom_source(
        "examples_jpeg2k.dcm",
        "ultrasound with power Doppler, 640 x 480; cropped to the scan, without the burnt-in text",
        "Modality US, ImageType SMALL PARTS",
    )
    pictures = _tiles(
        _read_dicom(source).pixel_array,
        _grid(60, 112, 132, 111, 4, 2),
        source=source,
        series="us_small_parts",
        facts={"modality": "ultrasound", "application": "small parts"},
    )
    source = _pydicom_source(
        "examples_ybr_color.dcm",
        "ultrasound cine, 30 frames of 320 x 240; cropped to the scan, without the burnt-in text",
        "Modality US, ImageType EPICARDIAL",
    )
    frames = _read_dicom(source).pixel_array
    for frame in (0, 10, 20):  # the same view: all of them stay on one side of the split
        pictures.append(
            _picture(
                frames[frame, 15:190, 42:295],
                source=source,
                series="us_epicardial",
                position=frame,
                region=f"frame {frame}, 42,15,295,190",
                facts={"modality": "ultrasound", "application": "epicardial"},
                may_be_held_out=False,
            )
        )
    return pictures


# --------------------------------------------------------------------------------- colour pictures (scikit-image)


def _skimage_source(file: str, licence: str, description: str, evidence: str) -> Source:
    return Source(package="skimage", file=f"data/{file}", licence=licence, description=description, evidence=evidence)


def photograph_pictures() -> list[Picture]:
    """Fundus, histology and cell pictures of scikit-image that lie in its wheel (never those it would fetch)."""

    def read(source: Source) -> np.ndarray:
        with Image.open(package_file(source.package, source.file)) as image:
            return np.asarray(image)

    source = _skimage_source(
        "retina.jpg", "CC0", "colour fundus photograph of a normal left eye, 1411 x 1411", "skimage.data.retina"
    )
    pixels = read(source)
    boxes = [
        (left, top, right, bottom)
        for left, top, right, bottom in _grid(5, 5, 280, 280, 5, 5)
        if (pixels[top:bottom, left:right].max(axis=-1) > 30).mean() > 0.8  # inside the round field of view
    ]
    fundus = {"modality": "fundus photography", "body_part": "retina"}
    pictures = _tiles(pixels, boxes, source=source, series="fundus", facts=fundus)
    source = _skimage_source(
        "microaneurysms.png", "CC0", "detail of a fundus photograph, green channel, 102 x 102",
        "skimage.data.microaneurysms",
    )  # fmt: skip
    pictures.append(_picture(read(source), source=source, series="fundus_green", position=0, facts=fundus))
    source = _skimage_source(
        "ihc.png", "no known copyright restrictions",
        "colonic glands, immunohistochemistry (DAB) with hematoxylin counterstain, 512 x 512",
        "skimage.data.immunohistochemistry",
    )  # fmt: skip
    facts = {"modality": "microscopy", "body_part": "colon", "stain": "immunohistochemistry with hematoxylin"}
    pictures += _tiles(read(source), _grid(0, 0, 128, 128, 4, 4), source=source, series="histology", facts=facts)
    source = _skimage_source(
        "cell.png", "CC0", "quantitative phase image of a cell floating in saline, 550 x 660", "skimage.data.cell"
    )
    pictures += _tiles(
        read(source),
        [(270, 270, 526, 526)],
        source=source,
        series="cell",
        facts={"modality": "microscopy", "body_part": "single cell"},
    )
    return pictures
