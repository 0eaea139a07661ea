"""Tensors of a checkpoint folder, for any layout: which stored chunks a rank needs, and their values.

torch.distributed.checkpoint plans what to read. The reading is done here, on each rank by itself and without its
`load`, which unpickles: a chunk comes from ``torch.load(weights_only=True)`` and must be what `.metadata` says it is.
"""

from __future__ import annotations

import io
import itertools
import math
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_hgpt.checkpoint.metadata_file import Contents, Place, told
from megatron_hgpt.checkpoint.state import Chunk
from megatron_hgpt.errors import CheckpointError, reason_of


@torch.no_grad()
def read_chunks(folder: Path, contents: Contents, chunks: Sequence[Chunk]) -> None:
    """Fill the tensors of `chunks` with what the folder holds of them.

    Raises:
        CheckpointError: a tensor or a part of it is missing, is of another shape, or cannot be read.
    """
    _check_shapes(folder, contents, chunks)
    requests: dict[tuple[str, tuple[int, ...]], list[tuple[ReadItem, torch.Tensor]]] = defaultdict(list)
    for wanted in chunks:
        rectangle = ChunkStorageMetadata(torch.Size(wanted.offset), wanted.tensor.shape)
        items = create_read_items_for_chunk_list(wanted.key, contents.tensors[wanted.key], [rectangle])
        if _do_overlap(items):
            raise CheckpointError(f"{folder} holds a part of {wanted.key} twice; use another checkpoint")
        if sum(math.prod(item.lengths) for item in items) != wanted.tensor.numel():
            raise CheckpointError(f"{folder} holds only a part of {wanted.key}; use another checkpoint")
        for item in items:
            requests[wanted.key, tuple(item.storage_index.offset or ())].append((item, wanted.tensor))
    if unknown := requests.keys() - contents.places.keys():
        raise CheckpointError(f"{folder} does not say where {min(unknown)[0]} lies; use another checkpoint")
    # In the order of the files: each is read from its beginning to its end.
    for key, offset in sorted(requests, key=lambda stored: contents.places[stored].position):
        value = _read_tensor(folder, contents, key, offset)
        for item, target in requests[key, offset]:
            _narrow(target, item.dest_offsets, item.lengths).copy_(_narrow(value, item.storage_offsets, item.lengths))


def read_whole(folder: Path, contents: Contents, key: str) -> torch.Tensor:
    """One stored tensor, whole, on the host; the caller has seen that its size is one to make room for.

    Raises:
        CheckpointError: as `read_chunks`.
    """
    stored = contents.tensors[key]
    target = torch.empty(stored.size, dtype=stored.properties.dtype)
    read_chunks(
        folder, contents, [Chunk(key=key, global_shape=tuple(stored.size), offset=(0,) * target.ndim, tensor=target)]
    )
    return target


def read_object(folder: Path, contents: Contents, key: str) -> Any:
    """A Python object of formats 1 and 2 as far as it is numbers, texts, containers and tensors.

    Raises:
        CheckpointError: it is missing, cannot be read, or holds anything else.
    """
    if (place := contents.places.get((key, None))) is None:
        raise CheckpointError(f"{folder} does not hold {key}; use another checkpoint")
    return _load(folder, place)


def _check_shapes(folder: Path, contents: Contents, chunks: Sequence[Chunk]) -> None:
    missing = sorted({wanted.key for wanted in chunks} - contents.tensors.keys())
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of the model, e.g. {missing[:3]}")
    for wanted in chunks:
        if (size := tuple(contents.tensors[wanted.key].size)) != wanted.global_shape:
            raise CheckpointError(f"{folder}: {wanted.key} is {size} there and {wanted.global_shape} in the model")


def _do_overlap(items: Sequence[ReadItem]) -> bool:
    """Whether two parts go to the same place: their numbers would add up to the whole, and leave holes."""
    boxes = sorted((tuple(item.dest_offsets), tuple(item.lengths)) for item in items if math.prod(item.lengths))
    for i, (start, shape) in enumerate(boxes):
        for other, lengths in itertools.islice(boxes, i + 1, None):
            if not start or other[0] >= start[0] + shape[0]:
                break
            if all(b < a + n and a < b + m for a, n, b, m in zip(start, shape, other, lengths, strict=True)):
                return True
    return False


def _narrow(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """The rectangle of `lengths` at `offsets`."""
    return tensor[tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))]


def _read_tensor(folder: Path, contents: Contents, key: str, offset: tuple[int, ...]) -> torch.Tensor:
    """The stored chunk of a tensor at an offset."""
    place, stored = contents.places[key, offset], contents.tensors[key]
    chunk = next(chunk for chunk in stored.chunks if tuple(chunk.offsets) == offset)
    if place.num_bytes < math.prod(chunk.sizes) * stored.properties.dtype.itemsize:
        raise CheckpointError(f"{folder / place.file} is damaged: {told(key)} is cut; use another checkpoint")
    value = _load(folder, place)
    is_as_described = (
        isinstance(value, torch.Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and (value.shape, value.dtype) == (chunk.sizes, stored.properties.dtype)
    )
    if not is_as_described:
        raise CheckpointError(
            f"{folder / place.file} is damaged: it holds another tensor than {told(key)}; use another checkpoint"
        )
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
        raise CheckpointError(
            f"{path} is damaged: {told(reason_of(error) or type(error).__name__)}; use another checkpoint"
        ) from error
