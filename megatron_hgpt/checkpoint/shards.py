"""Files of a checkpoint folder: one of tensors per rank, and the `.metadata` that says what lies where.

The format is that of torch.distributed.checkpoint, whose own readers read it. A file is hashed as it is written, and
on the disk before its name counts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, WriteItem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_hgpt.checkpoint.state import Chunk
from megatron_hgpt.files import sync_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A chunk in a file; numbers and texts alone, so that ranks can tell each other in JSON."""

    key: str
    global_shape: list[int]
    offset: list[int]
    shape: list[int]
    dtype: str
    """``float32``, …"""
    start: int
    """First byte in the file."""
    length: int
    """Bytes, with what torch.save writes around the values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """What one rank wrote."""

    file: str
    num_bytes: int
    sha256: str
    chunks: list[Stored]

    def to_json(self) -> dict[str, Any]:
        """For `from_json` on another rank."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Shard:
        """What `to_json` gave."""
        return cls(**{**content, "chunks": [Stored(**chunk) for chunk in content["chunks"]]})


class HashedFile:
    """A new file that is hashed while it is written, and on the disk when its block ends well."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, content: bytes | memoryview) -> int:
        """All of `content`."""
        self._hash.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        """torch.save asks for it."""
        self._file.flush()

    def tell(self) -> int:
        """Bytes written."""
        return self._file.tell()

    @property
    def sha256(self) -> str:
        """Of everything written, in hex."""
        return self._hash.hexdigest()


def write_shard(folder: Path, rank: int, chunks: Sequence[Chunk], check: Callable[[], None]) -> Shard:
    """Write one rank's file.

    Args:
        folder: exists.
        rank: names the file.
        chunks: in the host's memory, each with a storage of its own.
        check: called before each chunk; what it raises ends the writing.
    """
    name, stored = f"__{rank}_0.distcp", []
    with HashedFile(folder / name) as file:
        for chunk in chunks:
            check()
            start = file.tell()
            torch.save(chunk.tensor, file)  # type: ignore[arg-type]
            stored.append(
                Stored(
                    key=chunk.key,
                    global_shape=list(chunk.global_shape),
                    offset=list(chunk.offset),
                    shape=list(chunk.tensor.shape),
                    dtype=str(chunk.tensor.dtype).removeprefix("torch."),
                    start=start,
                    length=file.tell() - start,
                )
            )
        num_bytes = file.tell()
    sync_folder(folder)
    return Shard(file=name, num_bytes=num_bytes, sha256=file.sha256, chunks=stored)


def write_metadata(folder: Path, shards: Sequence[Shard]) -> None:
    """Write `.metadata` of all ranks' files.

    Raises:
        ValueError: the chunks overlap, or do not make whole tensors.
    """
    plans = [SavePlan([_write_item(chunk) for chunk in shard.chunks]) for shard in shards]
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _, metadata = planner.create_global_plan(plans)
    results = [
        WriteResult(
            index=item.index,
            size_in_bytes=chunk.length,
            storage_data=_StorageInfo(shard.file, chunk.start, chunk.length),
        )
        for plan, shard in zip(plans, shards, strict=True)
        for item, chunk in zip(plan.items, shard.chunks, strict=True)
    ]
    _MetadataWriter(folder).finish(metadata, [results])


class _MetadataWriter(FileSystemWriter):
    """DCP's, without the path and the random number that it would leave in the file."""

    def storage_meta(self) -> None:
        return None


def _write_item(chunk: Stored) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(chunk.key, torch.Size(chunk.offset)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)),
            properties=TensorProperties(dtype=getattr(torch, chunk.dtype)),
            size=torch.Size(chunk.global_shape),
        ),
    )
