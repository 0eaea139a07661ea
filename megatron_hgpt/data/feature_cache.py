"""The vision feature cache: what the frozen tower says of a dataset's pictures, computed once.

A sub-folder of the dataset folder, memory-mapped:

    <task>.bin         [pictures, p, c] in `dtype`: features at the task's depth, each distinct picture once
    <task>_rows.npy    int64, one entry per image of the dataset: its row; -1 not cached, -2 - i skipped (reason i)
    <task>_sums.npy    uint32 [pictures]: CRC-32 of each picture's features
    manifest.json      dataset and tower it belongs to, depths, sizes, dtype, counts, skips, bytes and sha256 of each
                       file, and `digest`, the sha256 of all that

It is written under a temporary name and renamed when it is complete. What is small is compared with its sha256 when the
cache is opened, features with their CRC each time they are read, everything by `hgpt verify`. A cache without sums is
of an earlier version. Shapes: p tokens per image, c tower width.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_hgpt.config import RunConfig, VisionConfig
from megatron_hgpt.data.mmap_format import MANIFEST
from megatron_hgpt.errors import ConfigError, DataError, SkipSample
from megatron_hgpt.files import Json, read_json, sealed, sha256_of
from megatron_hgpt.samples import Task
from megatron_hgpt.vision.clip import num_blocks_of, tower_hash

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
NOT_CACHED = -1
"""Row of an image whose task reads another depth."""
FIRST_SKIP = -2
"""Row of an image that could not be decoded, less the index of its reason."""
DTYPES: dict[str, tuple[torch.dtype, type[np.generic]]] = {
    "fp32": (torch.float32, np.float32),
    "fp16": (torch.float16, np.float16),
    "bf16": (torch.bfloat16, np.int16),  # NumPy has no bfloat16: its 16 bits are stored
}
"""Name -> type of the features, and what NumPy stores them as."""
_TOOL = "hgpt cache-features --overwrite writes it again"


def describe_tower(vision: VisionConfig) -> Json:
    """What a cache must have been made with, apart from its dataset.

    Raises:
        ConfigError: a size is not in `model.vision.hf_config`, or a depth is outside the tower.
        CheckpointError: the tower's folder holds no weights.
    """
    for key in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
        if key not in vision.hf_config:
            raise ConfigError(f"model.vision.hf_config.{key} is not set: copy it from the tower's config.json")
    return {
        "tower_sha256": tower_hash(vision),
        "image_size": vision.hf_config["image_size"],
        "num_image_tokens": vision.num_image_tokens,
        "hidden_size": vision.hf_config["hidden_size"],
        "num_blocks": {task.value: num_blocks_of(vision, task) for task in Task},
    }


def read_cache_manifest(folder: Path, *, verify_checksums: bool = False) -> Json:
    """Manifest of a cache after comparing the sizes of its files and the sha256 of the small ones.

    Args:
        folder: the cache.
        verify_checksums: compare the sha256 of all files, which reads everything.

    Raises:
        DataError: not a cache, another schema version, or a file that is missing, cut or changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is not a feature cache (no {MANIFEST}); hgpt cache-features writes one")
    try:
        manifest = read_json(path)
    except DataError as error:
        raise DataError(f"{error}; {_TOOL}") from error
    try:
        version = manifest["schema_version"]
        files = manifest["files"] if version == SCHEMA_VERSION else {}
        sizes = {name: int(size) for name, size in files.items()}
        digests = {name: str(manifest.get("sha256", {}).get(name, "")) for name in sizes}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{path} is not the manifest of a feature cache ({error!r}); {_TOOL}") from error
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema version {version}, this package reads {SCHEMA_VERSION}; {_TOOL}")
    if "digest" in manifest and manifest["digest"] != sealed(manifest)["digest"]:
        raise DataError(f"{path} is damaged: its digest is not that of its content; {_TOOL}")
    for name, size in sizes.items():
        file = folder / Path(name).name
        found = file.stat().st_size if file.is_file() else "no"
        if found != size:
            raise DataError(f"{file}: {found} bytes, {MANIFEST} says {size}; {_TOOL}")
        is_small = not name.endswith(".bin")
        if digests[name] and (verify_checksums or is_small) and sha256_of(file) != digests[name]:
            raise DataError(f"{file}: its sha256 differs from the manifest's; {_TOOL}")
    return manifest


class FeatureCache:
    """Features of one dataset's images, through memory maps.

    Args:
        folder: the cache.
        dataset: the dataset folder that it must belong to.
        tower: `describe_tower` of the model.
        tasks: whose depths are needed.

    Raises:
        DataError: damaged, or of another dataset, tower, depth or size; the difference is named.
    """

    def __init__(self, folder: Path, *, dataset: Path, tower: Json, tasks: Sequence[Task]) -> None:
        self.folder = folder
        self.manifest = read_cache_manifest(folder)
        self._check("dataset_sha256", self.manifest.get("dataset_sha256"), sha256_of(dataset / MANIFEST))
        for name in ("tower_sha256", "image_size", "num_image_tokens", "hidden_size"):
            self._check(name, self.manifest.get(name), tower[name])
        self._dtype, stored = DTYPES[self.manifest["dtype"]]
        self._rows: dict[Task, NDArray[np.int64]] = {}
        self._features: dict[Task, np.ndarray] = {}
        self._sums: dict[Task, NDArray[np.uint32]] = {}
        for task in tasks:
            count = self.manifest["pictures"][task.value]
            if count:
                found, wanted = self.manifest["num_blocks"][task.value], tower["num_blocks"][task.value]
                self._check(f"depth of {task.value} (blocks of the tower)", found, wanted)
            shape = (count, tower["num_image_tokens"], tower["hidden_size"])
            self._rows[task] = np.load(folder / f"{task.value}_rows.npy", allow_pickle=False)
            if (sums := folder / f"{task.value}_sums.npy").is_file():
                self._sums[task] = np.load(sums, allow_pickle=False)
            # An empty file cannot be mapped.
            self._features[task] = (
                np.memmap(folder / f"{task.value}.bin", stored, "r", shape=shape) if count else np.empty(shape, stored)
            )

    def _check(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            raise DataError(
                f"{self.folder}: {what} of the feature cache is {found!r}, the run needs {wanted!r}; {_TOOL}"
            )

    def read(self, numbers: Sequence[int], task: Task) -> list[torch.Tensor]:
        """Features [p, c] in the stored type of the images with these numbers in the dataset.

        Raises:
            SkipSample: an image could not be decoded when the cache was written: the same reason as then; or its
                features changed since (``corrupt_features``).
            DataError: an image is not in the cache.
        """
        features = []
        for number in numbers:
            row = int(self._rows[task][number])
            if row == NOT_CACHED:
                raise DataError(f"{self.folder}: image {number} is not cached at the depth of {task.value}; {_TOOL}")
            if row <= FIRST_SKIP:
                reason = self.manifest["skip_reasons"][FIRST_SKIP - row]
                raise SkipSample(reason, f"{self.folder}: image {number} could not be decoded")
            copied = np.array(self._features[task][row])
            if task in self._sums and zlib.crc32(copied.data) != self._sums[task][row]:
                where = f"{self.folder}: the features of image {number} changed since they were written: hgpt verify"
                raise SkipSample("corrupt_features", where)
            features.append(torch.from_numpy(copied).view(self._dtype))
        return features


def open_caches(config: RunConfig, folders: Sequence[str], tasks: Sequence[Task]) -> list[FeatureCache | None]:
    """The cache of each dataset folder, or None for each where `data.feature_cache` is not set.

    Raises:
        DataError: as `FeatureCache`.
        ConfigError, CheckpointError: as `describe_tower`.
    """
    name = config.data.feature_cache
    if name is None:
        return [None] * len(folders)
    tower = describe_tower(config.model.vision)
    caches = [FeatureCache(Path(f) / name, dataset=Path(f), tower=tower, tasks=tasks) for f in folders]
    for cache in caches:
        precisions = {cache.manifest["dtype"], cache.manifest["computed_in"]}
        if precisions != {config.training.precision}:
            logger.warning(
                "%s was computed in %s and is stored as %s, training.precision is %s: losses differ from those of "
                "the pictures by the rounding",
                cache.folder,
                cache.manifest["computed_in"],
                cache.manifest["dtype"],
                config.training.precision,
            )
    return list(caches)
