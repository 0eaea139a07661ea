"""The dataset folder: Megatron's IndexedDataset files (memory-mapped) and a manifest.

    tokens.bin/.idx      int32, one document per sample; IMAGE_TOKEN_ID (-200) once per image
    loss_mask.bin/.idx   uint8, as long as the tokens; 1 where the token is supervised
    images.bin/.idx      uint8, one document per sample with one sequence (a PNG file) per image, possibly none
    sample_ids.bin/.idx  uint8, UTF-8, one document per sample
    tasks.npy            uint8, `Task.code` of each sample
    checksums.npy        uint32 [n, 2]: CRC-32 of each sample's tokens, mask and id, and of its pictures
    manifest.json        schema version, tokenizer, template, vocabulary, VQGAN, counts, skips, sha256 of each file, and
                         `digest`, the sha256 of all that
    skipped.jsonl        one line per skipped record that is listed: id, where it stands, reason, detail

The folder is written under a temporary name and renamed when it is complete. What decides where everything stands
(.idx, .npy, manifest) is compared with its sha256 when the folder is opened, a sample with its CRC each time it is
read, and everything with its sha256 by `hgpt verify`. A folder without checksums.npy is of an earlier version.
"""

from __future__ import annotations

import json
import logging
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hgpt import cpu_platform
from megatron_hgpt.errors import DataError, SkipSample
from megatron_hgpt.files import Json, printable, read_json, replace_folder, sealed, sha256_of
from megatron_hgpt.samples import TASKS, Task

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"
_TASKS, _CHECKSUMS = "tasks.npy", "checksums.npy"
_STREAMS: dict[str, type[np.number]] = {
    "tokens": np.int32,
    "loss_mask": np.uint8,
    "images": np.uint8,
    "sample_ids": np.uint8,
}
_NAMES = {f"{stream}.{ending}" for stream in _STREAMS for ending in ("bin", "idx")} | {_TASKS, _CHECKSUMS, SKIPPED}
_REQUIRED = ("schema_version", "tokenizer", "template", "vocabulary", "counts", "files")
MAX_LISTED_SKIPS = 100
"""Skipped records listed in skipped.jsonl per reason; all are counted."""
_LISTED_ID = 200
"""Characters of an id in that list."""


class DatasetWriter:
    """Writes one dataset folder; a context manager that leaves no folder behind when the work is interrupted.

    Args:
        folder: final place.
        overwrite: replace a dataset that is there already, at the moment the new one is complete.

    Raises:
        DataError: `folder` exists and is not to be overwritten, or holds something else than a dataset; another process
            writes it; or it cannot be written.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False) -> None:
        if folder.exists() and not overwrite:
            raise DataError(f"{folder} exists already; choose another folder or pass --overwrite")
        if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise DataError(f"{folder} is not a dataset (no {MANIFEST}) and is not overwritten; choose another folder")
        self.folder = folder
        self._open = ExitStack()
        self._is_finished = False
        self._builders: Json = {}
        self._tasks: list[int] = []
        self._checksums: list[tuple[int, int]] = []
        self._counts = {"samples": 0, "images": 0, "tokens": 0, "supervised_tokens": 0}
        self._per_task: Counter[str] = Counter()
        self._per_source: Counter[str] = Counter()
        self._skips: Counter[str] = Counter()
        self._listed: list[Json] = []

    def __enter__(self) -> DatasetWriter:
        cpu_platform.install_if_needed()
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        with ExitStack() as stack:
            self._temporary = stack.enter_context(replace_folder(self.folder))
            for name, dtype in _STREAMS.items():
                self._builders[name] = IndexedDatasetBuilder(str(self._temporary / f"{name}.bin"), dtype=dtype)
                stack.callback(self._builders[name].data_file.close)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and not self._is_finished:
            with self._open:
                raise RuntimeError(f"{self.folder}: the block ended without finish(); nothing is kept")
        self._open.__exit__(kind, error, traceback)

    def add(
        self,
        *,
        sample_id: str,
        task: Task,
        tokens: Sequence[int],
        loss_mask: Sequence[bool],
        images: Sequence[bytes] = (),
        source: str = "",
    ) -> None:
        """Append one sample; `images` are encoded picture files."""
        if len(tokens) != len(loss_mask):
            raise DataError(f"sample {sample_id}: {len(tokens)} tokens but {len(loss_mask)} mask entries")
        stored, mask = np.asarray(tokens, np.int32), np.asarray(loss_mask, np.uint8)
        encoded_id = np.frombuffer(printable(sample_id).encode(), np.uint8)
        self._add_document("tokens", stored, [len(stored)])
        self._add_document("loss_mask", mask, [len(mask)])
        self._add_document("images", np.frombuffer(b"".join(images), np.uint8), [len(image) for image in images])
        self._add_document("sample_ids", encoded_id, [len(encoded_id)])
        self._tasks.append(task.code)
        self._checksums.append((_crc(stored, mask, encoded_id), _crc(*images)))
        self._per_task[task.value] += 1
        self._per_source[source] += 1
        for key, number in (("samples", 1), ("images", len(images)), ("tokens", len(tokens))):
            self._counts[key] += number
        self._counts["supervised_tokens"] += int(sum(loss_mask))

    def _add_document(self, stream: str, values: np.ndarray, lengths: list[int]) -> None:
        self._builders[stream].add_document(values, lengths)

    def skip(self, sample_id: str, reason: str, detail: str, **where: str | int) -> None:
        """Count a record that was left out; the first ones of each reason are listed, with `where` they stand."""
        self._skips[reason] += 1
        if self._skips[reason] <= MAX_LISTED_SKIPS:
            self._listed.append({"id": sample_id[:_LISTED_ID], **where, "reason": reason, "detail": detail})

    @property
    def num_samples(self) -> int:
        """Samples written so far."""
        return self._counts["samples"]

    @property
    def skips(self) -> dict[str, int]:
        """Records left out so far, by reason."""
        return dict(sorted(self._skips.items()))

    def finish(self, description: Json) -> Json:
        """Write indices and manifest; the folder moves into place when the block ends.

        Args:
            description: manifest entries of the caller: tokenizer, template, vocabulary, vq …

        Returns:
            The manifest.

        Raises:
            DataError: no sample was written.
        """
        if not self._tasks:
            skipped = ", ".join(f"{count} x {reason}" for reason, count in self.skips.items())
            remedy = "check --image-root and the records" if skipped else "give records"
            raise DataError(
                f"{self.folder}: no usable sample; skipped: {skipped or 'nothing, the input is empty'}; {remedy}"
            )
        for name, builder in self._builders.items():
            builder.finalize(str(self._temporary / f"{name}.idx"))
        np.save(self._temporary / _TASKS, np.asarray(self._tasks, np.uint8))
        np.save(self._temporary / _CHECKSUMS, np.asarray(self._checksums, np.uint32))
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self._listed)
        (self._temporary / SKIPPED).write_text(printable(lines), encoding="utf-8")
        per_source = dict(sorted(self._per_source.items()))
        counts = {**self._counts, "per_task": dict(sorted(self._per_task.items())), "per_source": per_source}
        manifest = sealed(
            {
                "schema_version": SCHEMA_VERSION,
                **description,
                "counts": counts,
                "skipped": self.skips,
                "files": {path.name: _fingerprint(path) for path in sorted(self._temporary.iterdir())},
            }
        )
        text = printable(json.dumps(manifest, indent=1, ensure_ascii=False))
        (self._temporary / MANIFEST).write_text(text + "\n", "utf-8")
        self._is_finished = True
        return manifest


def _fingerprint(path: Path) -> Json:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _crc(*parts: Any) -> int:
    """CRC-32 of buffers one after the other."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


def _manifest_problem(manifest: Json) -> str | None:
    """What is wrong with the content of a manifest, after its path."""
    missing = [key for key in _REQUIRED if key not in manifest]
    if missing:
        return f"has no field {missing[0]!r}"
    for key in ("tokenizer", "template", "vocabulary", "counts", "files"):
        if not isinstance(manifest[key], dict):
            return f"has {manifest[key]!r} for {key}, not a mapping"
    if type(manifest["counts"].get("samples")) is not int:
        return "has no number counts.samples"
    entries = manifest["files"]
    for name in sorted(_NAMES - {_CHECKSUMS, SKIPPED} | _NAMES & entries.keys()):
        if not isinstance(entries.get(name), dict) or {"bytes", "sha256"} - set(entries[name]):
            return f"does not list {name} with bytes and sha256"
    if "digest" in manifest and manifest["digest"] != sealed(manifest)["digest"]:
        return "is damaged: its digest is not that of its content"
    return None


def read_manifest(folder: Path, *, verify_checksums: bool = False) -> Json:
    """Manifest of a dataset folder, after comparing the sizes of its files and the sha256 of what indexes them.

    Args:
        folder: the dataset.
        verify_checksums: compare the sha256 of all files, which reads everything.

    Raises:
        DataError: not a dataset folder, another schema version, or a file that is missing, cut or changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is not a dataset folder (no {MANIFEST}); hgpt preprocess writes one")
    try:
        manifest = read_json(path)
    except DataError as error:
        raise DataError(f"{error}; write the dataset again") from error
    version = manifest.get("schema_version")
    if "schema_version" in manifest and version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema version {version}, this package reads {SCHEMA_VERSION}; write the dataset again"
        )
    problem = _manifest_problem(manifest)
    if problem is not None:
        raise DataError(f"{path} {problem}; write the dataset again")
    entries = manifest["files"]
    # The list of skipped records is for people: it may be deleted.
    for name in sorted(name for name in _NAMES & entries.keys() if name != SKIPPED or (folder / SKIPPED).is_file()):
        file, entry = folder / name, entries[name]
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            size = file.stat().st_size if file.is_file() else "no"
            raise DataError(f"{file}: {size} bytes, {MANIFEST} says {entry['bytes']}; copy or write the dataset again")
        is_index = not name.endswith(".bin")
        if (verify_checksums or is_index) and sha256_of(file) != entry["sha256"]:
            raise DataError(f"{file}: its sha256 differs from the manifest's; copy or write the dataset again")
    return manifest


class DatasetReader:
    """Random access to a dataset folder through memory maps.

    Raises:
        DataError: as `read_manifest`; or an index that does not fit the manifest.
    """

    def __init__(self, folder: Path, *, verify_checksums: bool = False) -> None:
        cpu_platform.install_if_needed()
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.folder = folder
        self.manifest = read_manifest(folder, verify_checksums=verify_checksums)
        self._num_samples: int = self.manifest["counts"]["samples"]
        self._streams: Json = {}
        for name in _STREAMS:
            # An empty file cannot be mapped: a dataset without pictures has an empty images.bin.
            if self.manifest["files"][f"{name}.bin"]["bytes"] == 0:
                continue
            try:
                self._streams[name] = IndexedDataset(str(folder / name))
            except (AssertionError, ValueError, KeyError, struct.error, OSError) as error:
                raise DataError(f"{folder / name}.idx cannot be read ({error}); write the dataset again") from error
            found = len(self._streams[name].document_indices) - 1
            if found != self._num_samples:
                raise DataError(f"{folder / name}.idx: {found} documents, {MANIFEST} says {self._num_samples} samples")
        self.tasks: NDArray[np.uint8] = self._load(_TASKS, np.uint8, (self._num_samples,))
        if self.tasks.max(initial=0) >= len(TASKS):
            raise DataError(f"{folder / _TASKS} holds task {self.tasks.max()}, there are {len(TASKS)}")
        self._checksums: NDArray[np.uint32] | None = None
        if _CHECKSUMS in self.manifest["files"]:
            self._checksums = self._load(_CHECKSUMS, np.uint32, (self._num_samples, 2))

    def _load(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
        path = self.folder / name
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, SyntaxError) as error:
            raise DataError(f"{path} cannot be read ({error}); write the dataset again") from error
        if array.dtype != dtype or array.shape != shape:
            raise DataError(f"{path}: {array.dtype} {array.shape} does not fit {self._num_samples} samples")
        return array

    def __len__(self) -> int:
        return self._num_samples

    def tokens(self, index: int) -> NDArray[np.int32]:
        """int32 [t] of sample `index`."""
        return self._document("tokens", index)[0]

    def loss_mask(self, index: int) -> NDArray[np.uint8]:
        """uint8 [t] of sample `index`."""
        return self._document("loss_mask", index)[0]

    def images(self, index: int) -> list[bytes]:
        """Encoded picture files of sample `index`, in order, as they are found."""
        return [image.tobytes() for image in self._document("images", index)]

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """int64 [n]: stored tokens of each sample, from the index alone."""
        return np.asarray(self._streams["tokens"].sequence_lengths, dtype=np.int64)

    @property
    def images_per_sample(self) -> NDArray[np.int64]:
        """int64 [n]: pictures of each sample, from the index alone."""
        if "images" not in self._streams:
            return np.zeros(self._num_samples, dtype=np.int64)
        return np.diff(self._streams["images"].document_indices).astype(np.int64)

    @property
    def num_images(self) -> int:
        """Images of all samples."""
        return len(self._streams["images"]) if "images" in self._streams else 0

    def image_numbers(self, index: int) -> range:
        """Where the images of sample `index` stand among those of all samples, in order."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        if "images" not in self._streams:
            return range(0)
        ends = self._streams["images"].document_indices
        return range(int(ends[index]), int(ends[index + 1]))

    def image(self, number: int) -> bytes:
        """Encoded picture file of image `number` of all samples."""
        return self._streams["images"][number].tobytes()

    def check(self, index: int, images: Sequence[bytes] | None) -> None:
        """Compare a sample, and its pictures where they are given, with the checksums it was written with.

        Raises:
            SkipSample: ``corrupt_sample``: something changed since then.
        """
        if self._checksums is None:
            return
        parts = [part for stream in ("tokens", "loss_mask", "sample_ids") for part in self._document(stream, index)]
        pairs = (("tokens, mask or id", parts), ("a picture", images))
        for column, (what, buffers) in enumerate(pairs):
            if buffers is not None and _crc(*buffers) != self._checksums[index, column]:
                raise SkipSample(
                    "corrupt_sample",
                    f"{self.folder}: {what} of sample {index} changed since it was written: hgpt verify",
                )

    def sample_id(self, index: int) -> str:
        """Id of sample `index`."""
        parts = self._document("sample_ids", index)
        return parts[0].tobytes().decode(errors="replace") if parts else ""

    def _document(self, stream: str, index: int) -> list[np.ndarray]:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        data = self._streams.get(stream)
        if data is None:
            return []
        first, end = data.document_indices[index], data.document_indices[index + 1]
        try:
            # Copies, because Megatron's reader unmaps its file when it is collected, even if views of it still exist.
            return [data[int(i)].copy() for i in range(first, end)]
        except (ValueError, IndexError) as error:
            where = f"{self.folder / stream}.idx points outside of its file at sample {index}"
            raise SkipSample("corrupt_sample", where) from error
