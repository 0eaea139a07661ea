"""Folders of safetensors files: headers, names, and tensors that are read when they are asked for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.files import Json, read_json

if TYPE_CHECKING:
    from safetensors import safe_open

_MAX_HEADER_BYTES = 100 * 2**20
"""As the safetensors library's own limit."""

Reader = Callable[[str], torch.Tensor]
"""Returns one HF tensor, whole, by name."""


def read_header(path: Path) -> tuple[Json, int]:
    """Tensor name -> ``{"dtype", "shape", "data_offsets"}`` of one file, and the byte at which its data start.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        if not all({"dtype", "shape", "data_offsets"} <= entry.keys() for entry in header.values()):
            raise ValueError("an entry without dtype, shape or data_offsets")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error!r}") from error
    return header, 8 + size


def open_checkpoint(folder: Path) -> tuple[set[str], Reader]:
    """Names and a reader of a folder of safetensors files; each tensor is read when it is asked for.

    Raises:
        CheckpointError: no safetensors files, a damaged one, or an index that names a missing file or tensor.
    """
    from safetensors import SafetensorError, safe_open

    handles: dict[str, safe_open] = {}

    def handle_of(file: str) -> safe_open:
        if file not in handles:
            try:
                handles[file] = safe_open(folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / file} is not a readable safetensors file: {error}") from error
        return handles[file]

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(files, dict):
            raise CheckpointError(f"{index} has no weight_map from tensors to files: download the folder again")
    elif (folder / "model.safetensors").is_file():
        files = dict.fromkeys(read_header(folder / "model.safetensors")[0], "model.safetensors")
    else:
        pickled = " (pytorch_model.bin is there: convert it with transformers' save_pretrained)"
        raise CheckpointError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json"
            f"{pickled if list(folder.glob('pytorch_model*.bin')) else ''}"
        )

    def read(name: str) -> torch.Tensor:
        file = files[name]
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise CheckpointError(f"{index} names {file!r} for {name}, which is not a file of {folder}")
        try:
            return handle_of(file).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{folder / file} does not hold {name}: {error}") from error

    return set(files), read
