"""Mini VL-Health: two thousand samples from 159 real pictures inside installed packages, in upstream's JSON schema.

It is a demonstration and a test bed, not a benchmark. Answers state what a file's metadata or its package's
documentation says (modality, plane, body part, sequence …), never a finding. Its held-out pictures come from the same
few volumes and photographs as the training pictures, so they measure interpolation, not transfer to new patients.

Folder written by `build_mini_vl_health`:

    images/0007.png      pixels only; images/0007_x4.png is the same picture at a quarter of the size
    train.json test.json records {"id", "image", "conversations", ...}; generation records add "task" and "target_image"
    wordings.json        training pictures asked in wordings that train.json and test.json do not have
    sources.json         the card: packages, licences, evidence, every picture's origin and split, statistics
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_hgpt.demo.mini_sources import Picture, dicom_pictures, photograph_pictures
from megatron_hgpt.demo.mini_volumes import volume_pictures
from megatron_hgpt.demo.questions import conversation, evaluation_questions, training_questions
from megatron_hgpt.errors import DataError
from megatron_hgpt.files import write_atomic

SPLITS = ("train", "test")
CARD_NAME = "sources.json"
HOLD_OUT_PERIOD, HOLD_OUT_OFFSET = 7, 3
"""Picture i of a series is held out where i mod 7 is 3."""
MIN_SLICE_GAP = 3
"""Slices between two pictures of one volume and plane: a neighbour within 2 is never in the other split."""
SUPER_RESOLUTION_FACTOR = 4

SPLIT_RULE = (
    "By picture: in each series (slices of a volume in one plane, tiles without overlap), ordered by position, picture "
    f"i is held out where i mod {HOLD_OUT_PERIOD} = {HOLD_OUT_OFFSET}. Slices are at least {MIN_SLICE_GAP} apart "
    "(functional.nii: 8 mm apart), so no neighbour within 2 slices is in the other split. Series whose pictures share "
    "content (ultrasound frames, overlapping bone-scan views) are for training only. The two pictures of a conversion "
    "pair are in the same split. Volumes are few: other slices of the same volume, and perpendicular slices that cross "
    "it, are in both splits."
)
CONVERSION_NOTE = (
    "anatomical.nii and functional.nii are both normalised by SPM to one template; their affines put slices 8, 12, 16 "
    "and 0, 1, 2 at the same 0, 8, 16 mm. The headers do not say whether the subject is the same. The packages hold no "
    "CT-MRI pair and no slice in two MR sequences, so no such conversion is made."
)
_CONVERSION_PAIRS = (
    (("anatomical/axial", 8), ("functional/axial", 0)),
    (("anatomical/axial", 12), ("functional/axial", 1)),
    (("anatomical/axial", 16), ("functional/axial", 2)),
)

_PROMPTS = {
    "reconstruction": "Reconstruct the image.",
    "super_resolution": "Increase the resolution of this image by a factor of four.",
    "anatomical_to_functional": "Convert this anatomical MRI slice to functional MRI.",
    "functional_to_anatomical": "Convert this functional MRI slice to anatomical MRI.",
}
"""One per kind: a constant distance between a patch and its index is what a small model learns first."""


def build_mini_vl_health(folder: Path, *, seed: int = 0, num_super_resolution: int = 40) -> dict[str, Any]:
    """Write the dataset; the same package versions and seed give the same bytes.

    Args:
        folder: where to write; the card is written last, so a folder with a card is complete.
        seed: chooses phrasings and wrong answers.
        num_super_resolution: upper limit of super-resolution records in training.

    Returns:
        The statistics of the card.

    Raises:
        DataError: a package is missing, or the splits are not disjoint.
    """
    pictures = all_pictures()
    splits = assign_splits(pictures)
    check_splits(pictures, splits)
    names = [f"images/{index:04d}.png" for index in range(len(pictures))]
    for picture, name in zip(pictures, names, strict=True):
        write_atomic(folder / name, _png(picture.image))
    records: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        members = [index for index in range(len(pictures)) if splits[index] == split]
        limit = num_super_resolution if split == "train" else len(members)
        facts = {names[index]: pictures[index].facts for index in members}
        ask = training_questions if split == "train" else evaluation_questions
        questions = ask(facts, random.Random(f"{seed}/{split}"))
        images = _generation(folder, pictures, members, names, limit)
        records[split] = _with_ids(split, questions + images)
        write_atomic(folder / f"{split}.json", json.dumps(records[split], indent=1) + "\n")
        if split == "train":
            unseen = evaluation_questions(facts, random.Random(f"{seed}/wordings"), held_out_wordings=True)
            unseen = _with_ids("wordings", unseen)
            write_atomic(folder / "wordings.json", json.dumps(unseen, indent=1) + "\n")
    statistics = _statistics(pictures, splits, records)
    write_atomic(folder / CARD_NAME, json.dumps(_card(pictures, splits, names, statistics, seed), indent=1) + "\n")
    return statistics


def all_pictures() -> list[Picture]:
    """Every picture, in a fixed order (some 160).

    Raises:
        DataError: a package or one of its files is missing.
    """
    return [*dicom_pictures(), *volume_pictures(), *photograph_pictures()]


def assign_splits(pictures: list[Picture]) -> list[str]:
    """The split of each picture, by `SPLIT_RULE`."""
    series: dict[str, list[int]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        series[picture.series].append(index)
    splits = ["train"] * len(pictures)
    for members in series.values():
        members.sort(key=lambda index: pictures[index].position)
        for order, index in enumerate(members):
            if order % HOLD_OUT_PERIOD == HOLD_OUT_OFFSET and pictures[index].may_be_held_out:
                splits[index] = "test"
    by_place = {(picture.series, picture.position): index for index, picture in enumerate(pictures)}
    for source, target in _CONVERSION_PAIRS:
        splits[by_place[target]] = splits[by_place[source]]
    return splits


def check_splits(pictures: list[Picture], splits: list[str]) -> None:
    """Raise where a held-out slice has a training neighbour closer than `MIN_SLICE_GAP`, or the same pixels.

    Raises:
        DataError: naming the two pictures.
    """
    seen: dict[bytes, int] = {}
    for index, picture in enumerate(pictures):
        pixels = picture.image.tobytes()
        other = seen.setdefault(pixels, index)
        if splits[other] != splits[index]:
            raise DataError(f"pictures {other} and {index} are equal and in different splits")
        if picture.facts.get("plane") is None or "slice" not in picture.region or picture.series == "functional/axial":
            continue  # tiles do not overlap; functional.nii's slices are 8 mm apart
        for other in range(index):
            gap = abs(pictures[other].position - picture.position)
            if pictures[other].series == picture.series and gap < MIN_SLICE_GAP and splits[other] != splits[index]:
                raise DataError(f"{picture.series}: slices {pictures[other].position} and {picture.position} are split")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(buffer, format="PNG")  # pixels only
    return buffer.getvalue()


def _generation(
    folder: Path, pictures: list[Picture], members: list[int], names: list[str], num_super_resolution: int
) -> list[dict[str, Any]]:
    """Reconstruction of three pictures in four, super-resolution of those with native detail, conversion pairs."""
    records = []

    def add(kind: str, image: str, target: str) -> None:
        records.append(conversation(image, _PROMPTS[kind], "", task="generation", target_image=target, kind=kind))

    for turn, index in enumerate(members):
        if turn % 4 != 3:
            add("reconstruction", names[index], names[index])
    detailed = [index for index in members if pictures[index].native and min(pictures[index].image.size) >= 64]
    keep = min(num_super_resolution, len(detailed))
    for turn in range(keep):
        index = detailed[turn * len(detailed) // keep]
        image = pictures[index].image
        small = image.resize(
            (round(image.width / SUPER_RESOLUTION_FACTOR), round(image.height / SUPER_RESOLUTION_FACTOR)),
            Image.Resampling.BICUBIC,
        )
        small_name = names[index].replace(".png", f"_x{SUPER_RESOLUTION_FACTOR}.png")
        write_atomic(folder / small_name, _png(small))
        add("super_resolution", small_name, names[index])
    by_place = {(pictures[index].series, pictures[index].position): index for index in members}
    for source, target in _CONVERSION_PAIRS:
        if source in by_place:
            anatomical, functional = names[by_place[source]], names[by_place[target]]
            add("anatomical_to_functional", anatomical, functional)
            add("functional_to_anatomical", functional, anatomical)
    return records


def _with_ids(split: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": f"mini-{split}-{number:04d}", **record} for number, record in enumerate(records)]


def _statistics(pictures: list[Picture], splits: list[str], records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    def counted(values: Iterable[str]) -> dict[str, int]:
        return dict(sorted(Counter(values).items()))

    statistics: dict[str, Any] = {}
    for split in SPLITS:
        asked = [record for record in records[split] if "answer_type" in record]
        members = [picture for picture, its_split in zip(pictures, splits, strict=True) if its_split == split]
        statistics[split] = {
            "pictures": len(members),
            "records": len(records[split]),
            "comprehension": counted(record["answer_type"] for record in asked),
            "generation": counted(record["kind"] for record in records[split] if "kind" in record),
            "answers": counted(record["conversations"][1]["value"] for record in asked),
            "modality": counted(picture.facts.get("modality", "not stated") for picture in members),
        }
    return statistics


def _card(
    pictures: list[Picture], splits: list[str], names: list[str], statistics: dict[str, Any], seed: int
) -> dict[str, Any]:
    sources = {picture.source.file: asdict(picture.source) for picture in pictures}
    packages = {"pydicom": "pydicom", "nibabel": "nibabel", "skimage": "scikit-image"}
    return {
        "name": "mini VL-Health",
        "seed": seed,
        "package_versions": {dist: importlib.metadata.version(dist) for dist in packages.values()},
        "sources": list(sources.values()),
        "split_rule": SPLIT_RULE,
        "conversion": CONVERSION_NOTE,
        "statistics": statistics,
        "pictures": [
            {
                "image": name,
                "split": split,
                "package": picture.source.package,
                "file": picture.source.file,
                "series": picture.series,
                "position": picture.position,
                "region": picture.region,
                "facts": picture.facts,
                "enlarged": not picture.native,
                "size": list(picture.image.size),
            }
            for picture, name, split in zip(pictures, names, splits, strict=True)
        ],
    }
