"""Writes the feature cache of one dataset folder: distinct pictures, through the tower in batches, onto disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_hgpt.config import VisionConfig
from megatron_hgpt.data.feature_cache import (
    DTYPES,
    FIRST_SKIP,
    NOT_CACHED,
    SCHEMA_VERSION,
    describe_tower,
    read_cache_manifest,
)
from megatron_hgpt.data.mmap_format import MANIFEST, DatasetReader
from megatron_hgpt.errors import ConfigError, DataError, SkipSample
from megatron_hgpt.files import Json, replace_folder, require_room, sealed, sha256_of
from megatron_hgpt.samples import Task
from megatron_hgpt.vision.clip import HVPTower
from megatron_hgpt.vision.preprocess import clip_preprocess, load_image

logger = logging.getLogger(__name__)

Rows = NDArray[np.int64]


@dataclass(kw_only=True, slots=True)
class CacheOptions:
    """How the features are computed and stored."""

    precision: str
    """fp32 or bf16: what the tower computes in, the run's `training.precision`."""
    dtype: str
    """A key of `DTYPES`: how the features are stored."""
    both_depths: bool = False
    """Cache every image at both depths, not only at the one that its sample's task reads."""
    batch_size: int = 32
    """Pictures per pass of the tower."""
    num_workers: int = 2
    """Threads that decode pictures while the tower runs."""
    overwrite: bool = False
    progress_bar: bool = False


class _Writer:
    """One task's pictures through the tower."""

    def __init__(self, reader: DatasetReader, tower: HVPTower, options: CacheOptions, reasons: list[str]) -> None:
        self._reader, self._tower, self._options, self._reasons = reader, tower, options, reasons
        self._at = next(tower.parameters())

    def write(self, task: Task, stream: BinaryIO, folder: Path) -> tuple[Rows, list[int]]:
        """Append the features of the task's distinct pictures; returns each image's row and each picture's CRC-32.

        Raises:
            DataError: a picture changed since the dataset was written, or the disk cannot hold the features.
        """
        distinct, pictures = self._distinct(task)
        itemsize = np.dtype(DTYPES[self._options.dtype][1]).itemsize
        tower = self._tower
        require_room(folder, len(pictures) * tower.num_image_tokens * tower.hidden_size * itemsize)
        sums: list[int] = []
        rows = np.empty(len(pictures) + 1, np.int64)
        rows[-1] = NOT_CACHED  # what `distinct` has for images of another task
        done = 0
        with tqdm(total=len(pictures), unit="picture", desc=task.value, disable=not self._options.progress_bar) as bar:
            for prepared in self._prepared(pictures):
                usable = [picture for picture in prepared if isinstance(picture, torch.Tensor)]
                following = itertools.count(len(sums))
                for picture in prepared:
                    rows[done] = next(following) if isinstance(picture, torch.Tensor) else self._skip(picture)
                    done += 1
                if usable:
                    features = self._features(torch.stack(usable), task)
                    stream.write(features.data)
                    sums += [zlib.crc32(picture.data) for picture in features]
                bar.update(len(prepared))
        return rows[distinct], sums

    def _distinct(self, task: Task) -> tuple[Rows, list[int]]:
        """Per image the index of its picture among the distinct ones (-1: not needed), and where each first occurs."""
        reader, seen, pictures = self._reader, dict[bytes, int](), list[int]()
        distinct = np.full(reader.num_images, -1, np.int64)
        samples = range(len(reader)) if self._options.both_depths else np.flatnonzero(reader.tasks == task.code)
        for sample in map(int, samples):
            images = reader.images(sample)
            try:
                reader.check(sample, images)
            except SkipSample as error:
                raise DataError(f"{error.detail} says which file; copy or write the dataset again") from error
            for number, image in zip(reader.image_numbers(sample), images, strict=True):
                digest = hashlib.sha256(image).digest()
                if digest not in seen:
                    seen[digest] = len(pictures)
                    pictures.append(number)
                distinct[number] = seen[digest]
        return distinct, pictures

    def _prepared(self, pictures: Sequence[int]) -> Iterator[list[torch.Tensor | SkipSample]]:
        """Batches of pictures ready for the tower; one is decoded while the one before it is computed."""
        size = self._options.batch_size
        chunks = [pictures[first : first + size] for first in range(0, len(pictures), size)]
        with ThreadPoolExecutor(max(self._options.num_workers, 1)) as pool:
            waiting = [pool.submit(self._prepare, number) for number in (chunks[0] if chunks else ())]
            for i in range(len(chunks)):
                following = chunks[i + 1] if i + 1 < len(chunks) else ()
                current, waiting = waiting, [pool.submit(self._prepare, number) for number in following]
                yield [future.result() for future in current]

    def _prepare(self, number: int) -> torch.Tensor | SkipSample:
        try:
            return clip_preprocess(load_image(self._reader.image(number)), self._tower.image_size)
        except SkipSample as error:
            logger.warning("image %d cannot be decoded, samples with it will be skipped: %s", number, error)
            return error

    def _skip(self, error: SkipSample) -> int:
        if error.reason not in self._reasons:
            self._reasons.append(error.reason)
        return FIRST_SKIP - self._reasons.index(error.reason)

    def _features(self, pixel_values: torch.Tensor, task: Task) -> np.ndarray:
        dtype, stored = DTYPES[self._options.dtype]
        features = self._tower(pixel_values.to(self._at), task).to("cpu", dtype).contiguous()
        if not bool(features.isfinite().all()):
            raise DataError(
                f"features of {task.value} are not finite as {self._options.dtype}; choose --dtype bf16 or fp32"
            )
        return features.view(torch.int16 if stored is np.int16 else dtype).numpy()


def cache_features(
    dataset: Path, output: Path, *, tower: HVPTower, vision: VisionConfig, options: CacheOptions
) -> Json:
    """Write the cache `output` of the dataset folder `dataset`; a complete one that fits is left as it is.

    Args:
        dataset, output: the dataset, and the folder that appears when everything is written.
        tower: of the configuration `vision`, on its device and in `options.precision`.
        vision: the model's.
        options: how features are computed and stored.

    Returns:
        The manifest.

    Raises:
        DataError: the dataset is damaged; `output` holds something else and is not to be overwritten, is written by
            another process, or cannot be written.
        ConfigError: unknown dtype or precision.
    """
    for name, value, allowed in (
        ("dtype", options.dtype, tuple(DTYPES)),
        ("training.precision", options.precision, ("fp32", "bf16")),
    ):
        if value not in allowed:
            raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}")
    reader = DatasetReader(dataset)
    description = {
        "schema_version": SCHEMA_VERSION,
        "dataset_sha256": sha256_of(dataset / MANIFEST),
        **describe_tower(vision),
        "computed_in": options.precision,
        "dtype": options.dtype,
        "both_depths": options.both_depths,
    }
    if output.exists() and (found := _existing(output, description, options.overwrite)) is not None:
        logger.info("%s is complete and fits; nothing to do", output)
        return found
    with replace_folder(output) as temporary:
        manifest = sealed({**description, **_write(temporary, reader, tower, options)})
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _write(folder: Path, reader: DatasetReader, tower: HVPTower, options: CacheOptions) -> Json:
    """Write features and rows of both tasks; returns the manifest's entries about them."""
    reasons: list[str] = []
    writer = _Writer(reader, tower, options, reasons)
    pictures, images = {}, 0
    skipped: Counter[str] = Counter()
    for task in Task:
        with (folder / f"{task.value}.bin").open("wb") as stream:
            rows, sums = writer.write(task, stream, folder)
        pictures[task.value] = len(sums)
        np.save(folder / f"{task.value}_rows.npy", rows)
        np.save(folder / f"{task.value}_sums.npy", np.asarray(sums, np.uint32))
        images += int((rows >= 0).sum())
        for row, count in zip(*np.unique(rows[rows <= FIRST_SKIP], return_counts=True), strict=True):
            skipped[reasons[FIRST_SKIP - int(row)]] += int(count)
    return {
        "pictures": pictures,
        "images": images,
        "skipped": dict(skipped),
        "skip_reasons": reasons,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "sha256": {path.name: sha256_of(path) for path in sorted(folder.iterdir())},
    }


def _existing(output: Path, description: Json, overwrite: bool) -> Json | None:
    """The manifest of a cache that fits; None where it may be replaced.

    Raises:
        DataError: it does not fit and is not to be overwritten, or is no cache.
    """
    marker = output / MANIFEST
    if not marker.is_file() or "tower_sha256" not in marker.read_text("utf-8", errors="replace"):
        raise DataError(f"{output} exists and is not a feature cache; choose another --name")
    if overwrite:
        return None
    manifest = read_cache_manifest(output)
    for name, wanted in description.items():
        if manifest.get(name) != wanted:
            raise DataError(
                f"{output} exists with {name} {manifest.get(name)!r}, wanted is {wanted!r}; pass --overwrite, or "
                "another --name"
            )
    return manifest
