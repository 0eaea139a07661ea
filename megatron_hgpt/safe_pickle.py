"""Files of tensors (`torch.save`) of other people: read without running anything that they name.

Such a file is a pickle, a program that may call whatever it can import. torch's own restricted reader makes tensors and
plain containers alone; here the classes that a trainer left beside them become stubs, so that its file is read as well.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

from megatron_hgpt.errors import HealthGPTError, reason_of


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
