"""Checkpoint folders in the formats that this package reads, for tests."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_hgpt.checkpoint.description import INFO
from megatron_hgpt.checkpoint.metadata_file import METADATA, Contents, read_contents, read_metadata_file
from megatron_hgpt.checkpoint.reading import read_whole
from megatron_hgpt.files import sealed


def contents_of(folder: Path) -> Contents:
    """What `.metadata` of a folder says."""
    return read_contents(folder, read_metadata_file(folder))


def plain_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    contents = contents_of(folder)
    return {key: read_whole(folder, contents, key) for key in contents.tensors}


def seal_folder(folder: Path, **changes: Any) -> None:
    """Describe the files that lie in a folder of format 3, as whoever writes one may."""
    info = json.loads((folder / INFO).read_text())
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.name != INFO
    }
    (folder / INFO).write_text(json.dumps(sealed({**info, "files": files, **changes})))


def write_as_format_2(source: Path, folder: Path) -> None:
    """A checkpoint of format 3 as one of format 2, which megatron.core's saver wrote; in an initialised process."""
    from megatron.core.dist_checkpointing import save
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    info = json.loads((source / INFO).read_text())
    layout = info["rng_layout"]
    states: dict[str, dict[str, Any]] = {}
    request: dict[str, Any] = {}
    for key, tensor in plain_tensors(source).items():
        if key.startswith("rng/"):
            _, place, name = key.split("/", 2)
            tracked = states.setdefault(place, {"tracker": {}})
            is_tracked = name.startswith("tracker/")
            (tracked["tracker"] if is_tracked else tracked)[name.removeprefix("tracker/")] = tensor
        else:
            request[key] = ShardedTensor.from_rank_offsets(key, tensor)
    for place, state in states.items():
        request[f"rng {place}"] = ShardedObject("rng", state, tuple(layout), tuple(map(int, place.split("."))))
    folder.mkdir(parents=True)
    save(request, str(folder))
    shutil.copy(source / "resolved_config.yaml", folder)
    new = ("is_healthy", "files", "digest", "publication")
    old = {key: value for key, value in info.items() if key not in new}
    (folder / INFO).write_text(json.dumps({**old, "format_version": 2}))


def plant_in_object(folder: Path, trap: object) -> None:
    """Put what pickle makes of `trap` where a folder of format 2 keeps the ranks' random states."""
    from torch.distributed import checkpoint

    torch.save([trap], folder / "trap.distcp")
    metadata = checkpoint.FileSystemReader(folder).read_metadata()
    for index, place in metadata.storage_data.items():
        if index.fqn in contents_of(folder).objects:
            place.relative_path, place.offset = "trap.distcp", 0
            place.length = (folder / "trap.distcp").stat().st_size
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
