"""Whether a dataset folder and its feature caches are what was written: every byte, and every sample as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_hgpt.data.feature_cache import read_cache_manifest
from megatron_hgpt.data.mmap_format import MANIFEST, DatasetReader
from megatron_hgpt.errors import DataError, SkipSample


def verify_dataset(folder: Path) -> Iterator[tuple[Path, int]]:
    """Compare all files with their checksums; each folder that is right, the dataset first, with its bytes.

    Raises:
        DataError: it is no dataset, or a file is missing, cut or changed.
    """
    reader = DatasetReader(folder, verify_checksums=True)
    for index in range(len(reader)):
        try:
            reader.check(index, reader.images(index))
        except SkipSample as error:
            raise DataError(error.detail) from error
    yield folder, sum(entry["bytes"] for entry in reader.manifest["files"].values())
    for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
        yield manifest.parent, sum(read_cache_manifest(manifest.parent, verify_checksums=True)["files"].values())
