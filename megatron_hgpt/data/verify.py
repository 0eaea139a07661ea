"""Whether a dataset folder and its feature caches are what was written: every byte, and every sample as a whole."""

from __future__ import annotations

from pathlib import Path

from megatron_hgpt.data.feature_cache import read_cache_manifest
from megatron_hgpt.data.mmap_format import MANIFEST, DatasetReader
from megatron_hgpt.errors import DataError, SkipSample


def verify_dataset(folder: Path) -> int:
    """Compare all files of a dataset, but not of its caches, with their checksums; returns their bytes.

    Raises:
        DataError: it is no dataset, or a file is missing, cut or changed.
    """
    reader = DatasetReader(folder, verify_checksums=True)
    for index in range(len(reader)):
        try:
            reader.check(index, reader.images(index))
        except SkipSample as error:
            raise DataError(error.detail) from error
    return sum(entry["bytes"] for entry in reader.manifest["files"].values())


def feature_caches(folder: Path) -> list[Path]:
    """The feature caches in a dataset's folder."""
    return (
        [manifest.parent for manifest in sorted(folder.glob(f"*/{MANIFEST}"))] if (folder / MANIFEST).is_file() else []
    )


def verify_cache(folder: Path) -> int:
    """As `verify_dataset`, for a feature cache."""
    return sum(read_cache_manifest(folder, verify_checksums=True)["files"].values())
