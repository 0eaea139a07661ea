"""Pickles of other people: only the classes that a file must have are made, and no other code runs.

A pickle is a program: it may call whatever it can import. torch.distributed.checkpoint (DCP) keeps the map of a
checkpoint as one, so that it is read here by an allow-list. Tensor files (`torch.save`) have a restricted reader of
their own, ``torch.load(weights_only=True)``; `load_tensors` adds stubs for the classes that a trainer left beside them.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_hgpt.errors import HealthGPTError, reason_of

MAX_PICKLE_BYTES = 2**28
"""A map of some million shards; reading takes several times its size in memory."""

_DTYPES = (
    "bfloat16 bool complex64 complex128 float16 float32 float64 float8_e4m3fn float8_e5m2 int8 int16 int32 int64 "
    "uint8 uint16 uint32 uint64"
)

DCP_METADATA = frozenset(
    {
        *(("torch", name) for name in _DTYPES.split()),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),  # looks a name up in a table: how a tensor's layout is pickled
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # of Python 3.13
    }
    | {
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "_MEM_FORMAT_ENCODING", "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
            "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        )
    }
    | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.planner", name)
            for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
        ),
    }
)  # fmt: skip
"""What DCP's ``.metadata`` holds: dataclasses and enums without code of their own, sizes, dtypes and one path.

The planner's classes are in what Megatron's saver wrote, which keeps each rank's plan there.
"""


class AllowListUnpickler(pickle._Unpickler):
    """Reads a pickle that may name `allowed` alone, and fills attributes of instances of dataclasses only.

    It is Python's own reader in Python, not the one in C, which would let a file overwrite methods of an allowed class
    (the instruction BUILD takes a class as well) and reserve memory for a memo of 2³² entries.

    Args:
        file: the pickle.
        allowed: (module, name) of the classes and functions.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: io.BytesIO, allowed: Collection[tuple[str, str]]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str, /) -> Any:
        """The allowed class or function.

        Raises:
            pickle.UnpicklingError: another one.
        """
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which such a file does not need")
        return super().find_class(module, name)

    def _load_build(self) -> None:
        target = self.stack[-2]  # type: ignore[attr-defined]
        if not dataclasses.is_dataclass(type(target)):
            raise pickle.UnpicklingError(f"it sets attributes of {target!r}")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    dispatch[pickle.BUILD[0]] = _load_build  # type: ignore[assignment]


def unpickle(path: Path, allowed: Collection[tuple[str, str]], error: type[HealthGPTError]) -> Any:
    """The object in a file that may name `allowed` alone, e.g. `DCP_METADATA`.

    Raises:
        error: the file cannot be read, is damaged or too large, or names something else.
    """
    try:
        if (size := path.stat().st_size) > MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(f"it has {size} bytes, more than {MAX_PICKLE_BYTES}")
        return AllowListUnpickler(io.BytesIO(path.read_bytes()), allowed).load()
    except Exception as problem:  # a damaged pickle raises whatever its instructions meet
        raise error(f"{path} is refused: {_one_line(problem)}; nothing in it was run") from problem


def load_tensors(path: Path, error: type[HealthGPTError]) -> Any:
    """What `torch.save` wrote, on the CPU, without running any code and in no more memory than the file takes.

    Classes of other packages (callbacks of PyTorch Lightning, OmegaConf's nodes) become stubs that hold nothing; they
    need not be installed. A name of Python's own library that is no data is refused: only an attack has it there.

    Raises:
        error: the file cannot be read, is damaged, compressed, or names such a thing.
    """
    import torch

    try:
        foreign = _foreign_names(path) if zipfile.is_zipfile(path) else []
        with torch.serialization.safe_globals([(_stub(name), name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # a damaged pickle raises whatever its instructions meet
        raise error(f"{path} is refused: {_one_line(problem)}; nothing in it was run") from problem


def _foreign_names(path: Path) -> list[str]:
    """Dotted names of the classes that torch's reader does not know, all of which may become stubs."""
    import torch

    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise pickle.UnpicklingError("it is compressed, which torch.save never does")
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    for name in names:
        package = name.partition(".")[0]
        if package in sys.stdlib_module_names and package not in _DATA_MODULES:
            raise pickle.UnpicklingError(f"it names {name}, which no file of tensors needs")
    return names


_DATA_MODULES = ("argparse", "collections", "datetime", "enum", "functools", "pathlib", "typing")
"""Of Python's library, what trainers keep their settings in."""


def _stub(name: str) -> type:
    """A class that takes any arguments and any state, and keeps neither."""

    def new(cls: type, *_arguments: object, **_named: object) -> object:
        return object.__new__(cls)

    def ignore(_self: object, *_arguments: object, **_named: object) -> None:
        return None

    methods: dict[str, Any] = {"__new__": new, "__init__": ignore, "__setstate__": ignore}
    return type(name, (), methods)


def _one_line(problem: Exception) -> str:
    text = " ".join((reason_of(problem) or type(problem).__name__).split())
    # torch says to read the file with weights_only=False, which is the one thing not to do.
    return text.partition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0] or text
