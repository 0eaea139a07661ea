"""Results of one evaluated split as a folder, so that ranks can evaluate now and one process can report later.

    <folder>/results.json        split, summaries, one record per result (file names instead of images)
    <folder>/images/000000.png   the images, numbered; equal images are stored once

results.json is written last: a folder without it is an evaluation that did not finish.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from megatron_hgpt.errors import DataError, reason_of
from megatron_hgpt.evaluation.image import summarise_images
from megatron_hgpt.evaluation.results import ImageResult, VQAResult
from megatron_hgpt.evaluation.vqa import summarise_vqa
from megatron_hgpt.files import write_atomic

__all__ = ["Evaluation", "ImageResult", "VQAResult", "load_results", "save_results"]

_IMAGE_FIELDS = {"image", "input", "target", "round_trip", "output"}
Result = TypeVar("Result", VQAResult, ImageResult)


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """All results of one split."""

    split: str
    """``train``, ``held-out`` …"""
    vqa: list[VQAResult]
    images: list[ImageResult]


def save_results(
    folder: Path, *, vqa: Sequence[VQAResult], images: Sequence[ImageResult], split: str
) -> dict[str, Any]:
    """Write a split's results, replacing those of an earlier evaluation; one process calls this.

    Returns:
        The summaries as stored: {"vqa": `summarise_vqa`, "images": `summarise_images`}.
    """
    summary = {"vqa": summarise_vqa(vqa), "images": summarise_images(images)}
    (folder / "results.json").unlink(missing_ok=True)
    if (folder / "images").exists():
        shutil.rmtree(folder / "images")
    names: dict[bytes, str] = {}

    def store(image: Image.Image) -> str:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG")
        data = buffer.getvalue()
        if data not in names:
            names[data] = f"{len(names):06d}.png"
            write_atomic(folder / "images" / names[data], data)
        return names[data]

    def as_record(result: VQAResult | ImageResult) -> dict[str, Any]:
        values = {field.name: getattr(result, field.name) for field in fields(result)}
        return {name: store(value) if isinstance(value, Image.Image) else value for name, value in values.items()}

    document = {
        "split": split,
        "summary": summary,
        "vqa": [as_record(result) for result in vqa],
        "images": [as_record(result) for result in images],
    }
    write_atomic(folder / "results.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return summary


def load_results(folder: Path) -> Evaluation:
    """Read what `save_results` wrote.

    Raises:
        DataError: results.json or an image is missing or damaged, or a record has other fields than expected.
    """
    path = folder / "results.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Evaluation(
            split=str(document["split"]),
            vqa=[_from_record(VQAResult, record, folder) for record in document["vqa"]],
            images=[_from_record(ImageResult, record, folder) for record in document["images"]],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a readable evaluation ({type(error).__name__}: {reason_of(error)}); run the evaluation again"
        ) from error


def _from_record(cls: type[Result], record: dict[str, Any], folder: Path) -> Result:
    values: dict[str, Any] = {}
    for name, value in record.items():
        if name in _IMAGE_FIELDS:
            values[name] = None if value is None else _read_image(folder, value)
        elif isinstance(value, str):
            values[name] = value
        else:
            raise ValueError(f"field {name!r} is {value!r} instead of a string")
    return cls(**values)


def _read_image(folder: Path, name: str) -> Image.Image:
    if Path(name).name != name:
        raise ValueError(f"image name {name!r} points outside the folder")
    with Image.open(folder / "images" / name, formats=["PNG"]) as image:
        return image.convert("RGB")
