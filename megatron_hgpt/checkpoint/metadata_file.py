"""`.metadata` of torch.distributed.checkpoint, read without running anything that it names.

The file is a pickle, and torch reads it with `pickle.load`: a planted object would run as the user. Here the names that
torch and megatron.core write stand for inert records, every other name is refused, and what the records hold is checked
before it is believed. Nothing in the file is imported or called.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from megatron_hgpt.errors import CheckpointError, reason_of, shown

METADATA = ".metadata"
MAX_METADATA_BYTES = 256 * 2**20
"""Far above what thousands of ranks write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a chunk or an object lies: one torch.save file inside a file of the folder."""

    file: str
    offset: int
    num_bytes: int

    @property
    def position(self) -> tuple[str, int]:
        """What to sort by."""
        return self.file, self.offset


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What a checkpoint folder holds."""

    tensors: dict[str, TensorStorageMetadata]
    objects: set[str]
    """Keys of Python objects, which formats 1 and 2 kept random states in."""
    places: dict[tuple[str, tuple[int, ...] | None], Place]
    """Key and offset of a chunk (None: of an object) -> where it lies."""


class _Record:
    """Stands for an object of a class that the file names: what it was made of, and nothing that acts."""

    def __new__(cls, *args: Any) -> _Record:
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    args: tuple[Any, ...]
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


_TORCH = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_NAMES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "PurePosixPath", "Path"),
    "pathlib._local": ("PosixPath", "PurePosixPath", "Path"),
    "collections": ("OrderedDict",),
    f"{_TORCH}.metadata": (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    ),
    f"{_TORCH}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    f"{_TORCH}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    _MEGATRON: ("MCoreMetadata", "MCoreSavePlan"),
}  # fmt: skip
"""Module -> the names in it that torch and megatron.core put into the file."""
_CLASSES: dict[tuple[str, str], type[_Record]] = {
    (module, name): type(name, (_Record,), {}) for module, names in _NAMES.items() for name in names
}
_METADATA = _CLASSES[f"{_TORCH}.metadata", "Metadata"]
_INDEX = _CLASSES[f"{_TORCH}.metadata", "MetadataIndex"]
_TENSOR = _CLASSES[f"{_TORCH}.metadata", "TensorStorageMetadata"]
_BYTES = _CLASSES[f"{_TORCH}.metadata", "BytesStorageMetadata"]
_CHUNK = _CLASSES[f"{_TORCH}.metadata", "ChunkStorageMetadata"]
_PROPERTIES = _CLASSES[f"{_TORCH}.metadata", "TensorProperties"]
_STORAGE = _CLASSES[f"{_TORCH}.filesystem", "_StorageInfo"]
_SIZE = _CLASSES["torch", "Size"]


# The reader in Python: the one in C makes room for as many memo entries as two bytes of the file ask for.
# (Any: typeshed does not name the methods of it.)
_PythonUnpickler: Any = pickle._Unpickler


class _InertUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Records for the names above, a type of numbers for ``torch.float32`` and its like, and no other name.

    The keys of its dictionaries are texts and records: to hash tuples of tuples could take for ever.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(number_type := getattr(torch, name, None), torch.dtype):
            return number_type
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs and which may run code")

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        super().load_setitems()

    def load_dict(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        super().load_dict()

    def load_frozenset(self) -> None:
        raise pickle.UnpicklingError("it holds a set")

    load_additems = load_frozenset

    dispatch: ClassVar[dict[int, Any]] = {
        **_PythonUnpickler.dispatch,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.ADDITEMS[0]: load_additems,
    }


def _check_key(key: Any) -> None:
    if not isinstance(key, str | _Record):
        raise pickle.UnpicklingError(f"a {type(key).__name__} stands where a name belongs")


def read_contents(folder: Path, content: bytes) -> Contents:
    """What ``.metadata`` of a folder says.

    Args:
        folder: for messages, and to see that places lie inside its files.
        content: of the file.

    Raises:
        CheckpointError: it is damaged, names something that may run code, or points outside its folder.
    """
    path = folder / METADATA
    try:
        record = _InertUnpickler(io.BytesIO(content)).load()
        state = _state(record, _METADATA)
        entries = {key: entry for key, entry in _items(state["state_dict_metadata"]) if isinstance(entry, _TENSOR)}
        if sum(len(_state(entry, _TENSOR)["chunks"]) for entry in entries.values()) > len(content):
            raise ValueError("it names the same chunks again and again")
        tensors = {key: _tensor(entry) for key, entry in entries.items()}
        objects = {key for key, entry in _items(state["state_dict_metadata"]) if isinstance(entry, _BYTES)}
        sizes = functools.cache(lambda name: (folder / name).stat().st_size)
        places = dict(_place(index, info, sizes) for index, info in state["storage_data"].items())
    # Whatever bytes can do to an unpickler; nothing of it may reach the user as a traceback.
    except Exception as error:
        raise CheckpointError(
            f"{path} is refused: {told(reason_of(error) or type(error).__name__)}; use another checkpoint"
        ) from error
    return Contents(tensors=tensors, objects=objects, places=places)


def told(text: str) -> str:
    """What a file's content may have worded, as one line that a terminal can show."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split())[:200])


def read_metadata_file(folder: Path) -> bytes:
    """The bytes of ``.metadata``.

    Raises:
        CheckpointError: it cannot be read, or is far too large.
    """
    path = folder / METADATA
    try:
        if (size := path.stat().st_size) > MAX_METADATA_BYTES:
            raise CheckpointError(f"{path} is refused: {size} bytes; use another checkpoint")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason_of(error)}") from error


def _state(record: Any, kind: type[_Record]) -> dict[str, Any]:
    """The fields of a record of one class."""
    if not isinstance(record, kind) or not isinstance(record.state, dict):
        raise ValueError(f"a {type(record).__name__} stands where a {kind.__name__} belongs")
    return record.state


def _items(mapping: Any) -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise ValueError(f"a {type(key).__name__} is no name of a tensor")
        yield key, value


def _size(record: Any) -> tuple[int, ...]:
    """The numbers of a torch.Size."""
    if not isinstance(record, _SIZE) or len(record.args) != 1:
        raise ValueError("a size is no torch.Size")
    numbers = record.args[0]
    if not isinstance(numbers, tuple | list) or len(numbers) > 16 or any(not _is_count(number) for number in numbers):
        raise ValueError("a torch.Size is no size of a tensor")
    return tuple(numbers)


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**48


def _tensor(record: Any) -> TensorStorageMetadata:
    """What torch's planner reads of a tensor."""
    state = _state(record, _TENSOR)
    properties, size = state["properties"], _size(state["size"])
    number_type = properties.state[0] if isinstance(properties, _PROPERTIES) else None
    if not isinstance(number_type, torch.dtype):
        raise ValueError("a tensor has no type of numbers")
    chunks = []
    for chunk in state["chunks"]:
        fields = _state(chunk, _CHUNK)
        offsets, sizes = _size(fields["offsets"]), _size(fields["sizes"])
        ends = [offset + length for offset, length in zip(offsets, sizes, strict=True)]
        if any(end > whole for end, whole in zip(ends, size, strict=True)):
            raise ValueError(f"a chunk at {offsets} of {sizes} leaves its tensor of {size}")
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    return TensorStorageMetadata(TensorProperties(dtype=number_type), torch.Size(size), chunks)


def _place(index: Any, info: Any, size_of: Callable[[str], int]) -> tuple[tuple[str, tuple[int, ...] | None], Place]:
    key, place = _state(index, _INDEX), _state(info, _STORAGE)
    name, offset, length = place["relative_path"], place["offset"], place["length"]
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{shown(name) if isinstance(name, str) else type(name).__name__} is no file of the folder")
    if place.get("transform_descriptors"):
        raise ValueError(f"{shown(name)} is transformed, which is not read here")
    if not (_is_count(offset) and _is_count(length)):
        raise ValueError(f"{shown(name)} has no offset and length")
    if offset + length > size_of(name):
        raise ValueError(f"{shown(name)} ends before {offset + length} bytes")
    if not isinstance(key["fqn"], str):
        raise ValueError(f"a {type(key['fqn']).__name__} is no name of a tensor")
    chunk = key.get("offset")  # an object has none
    return (key["fqn"], None if chunk is None else _size(chunk)), Place(file=name, offset=offset, num_bytes=length)
