"""Tensors of a checkpoint folder, for any layout: which stored chunks a rank needs, and their values.

torch.distributed.checkpoint plans what to read. The reading is done here, on each rank by itself and without its
`load`, which unpickles: a chunk comes from ``torch.load(weights_only=True)`` and must be what `.metadata` says it is.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_hgpt.checkpoint.metadata_file import Contents, Place, num_bytes_of
from megatron_hgpt.checkpoint.state import Chunk
from megatron_hgpt.errors import CheckpointError, reason_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A rectangle of a stored tensor, and where its values go."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Of the rectangle in the stored tensor."""
    target: torch.Tensor
    """Of the rectangle's shape, with as many axes as the stored tensor; written in place."""


def pieces_of(chunks: Iterable[Chunk]) -> list[Piece]:
    """What a rank holds as what it asks for; its tensors are filled."""
    return [
        Piece(key=chunk.key, global_shape=chunk.global_shape, offset=chunk.offset, target=chunk.tensor)
        for chunk in chunks
    ]


@torch.no_grad()
def read_pieces(folder: Path, contents: Contents, pieces: Sequence[Piece]) -> None:
    """Fill the targets of `pieces`.

    Raises:
        CheckpointError: a tensor or a part of it is missing, is of another shape, or cannot be read.
    """
    _check_shapes(folder, contents, pieces)
    requests: dict[Place, list[tuple[ReadItem, TensorStorageMetadata, torch.Tensor]]] = defaultdict(list)
    for piece in pieces:
        stored = contents.tensors[piece.key]
        wanted = ChunkStorageMetadata(torch.Size(piece.offset), piece.target.shape)
        items = create_read_items_for_chunk_list(piece.key, stored, [wanted])
        if sum(math.prod(item.lengths) for item in items) != piece.target.numel():
            raise CheckpointError(f"{folder} holds only a part of {piece.key}; use another checkpoint")
        for item in items:
            place = contents.places.get((piece.key, tuple(item.storage_index.offset or ())))
            if place is None:
                raise CheckpointError(f"{folder} does not say where {piece.key} lies; use another checkpoint")
            requests[place].append((item, stored, piece.target))
    for place in sorted(requests, key=lambda place: (place.file, place.offset)):
        stored_key = requests[place][0][0].storage_index
        stored = requests[place][0][1]
        chunk = next(chunk for chunk in stored.chunks if chunk.offsets == stored_key.offset)
        value = _read_tensor(folder, place, chunk, stored)
        for item, _, target in requests[place]:
            _narrow(target, item.dest_offsets, item.lengths).copy_(_narrow(value, item.storage_offsets, item.lengths))


def read_whole(folder: Path, contents: Contents, key: str) -> torch.Tensor:
    """One stored tensor, whole, on the host.

    Raises:
        CheckpointError: as `read_pieces`.
    """
    stored = contents.tensors[key]
    target = torch.empty(stored.size, dtype=stored.properties.dtype)
    piece = Piece(key=key, global_shape=tuple(stored.size), offset=(0,) * target.ndim, target=target)
    read_pieces(folder, contents, [piece])
    return target


def read_object(folder: Path, contents: Contents, key: str) -> Any:
    """A Python object of formats 1 and 2 as far as it is numbers, texts, containers and tensors.

    Raises:
        CheckpointError: it is missing, cannot be read, or holds anything else.
    """
    if (place := contents.places.get((key, None))) is None:
        raise CheckpointError(f"{folder} does not hold {key}; use another checkpoint")
    return _load(folder, place)


def _check_shapes(folder: Path, contents: Contents, pieces: Sequence[Piece]) -> None:
    missing = sorted({piece.key for piece in pieces} - contents.tensors.keys())
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of the model, e.g. {missing[:3]}")
    for piece in pieces:
        if (size := tuple(contents.tensors[piece.key].size)) != piece.global_shape:
            raise CheckpointError(f"{folder}: {piece.key} is {size} there and {piece.global_shape} in the model")


def _narrow(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """The rectangle of `lengths` at `offsets`."""
    return tensor[tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))]


def _read_tensor(
    folder: Path, place: Place, chunk: ChunkStorageMetadata, stored: TensorStorageMetadata
) -> torch.Tensor:
    if place.num_bytes < num_bytes_of(chunk, stored):
        raise CheckpointError(f"{folder / place.file} is damaged: a tensor is cut; use another checkpoint")
    value = _load(folder, place)
    is_as_described = (
        isinstance(value, torch.Tensor) and value.shape == chunk.sizes and value.dtype == stored.properties.dtype
    )
    if not is_as_described:
        raise CheckpointError(f"{folder / place.file} is damaged: it holds another tensor; use another checkpoint")
    return value


def _load(folder: Path, place: Place) -> Any:
    """What torch.save wrote, by its restricted unpickler, on the host.

    Raises:
        CheckpointError: it cannot be read, or holds what could run code.
    """
    path = folder / place.file
    try:
        with path.open("rb") as stream:
            stream.seek(place.offset)
            content = io.BytesIO(stream.read(place.num_bytes))
        # torch.save packs nothing: a packed entry could take a thousand times its room.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(content).infolist()):
            raise ValueError("an entry is compressed")
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)
    # Damage shows as any of a dozen types.
    except Exception as error:
        reason = " ".join((reason_of(error) or type(error).__name__).split())[:200]
        raise CheckpointError(f"{path} is damaged: {reason}; use another checkpoint") from error
