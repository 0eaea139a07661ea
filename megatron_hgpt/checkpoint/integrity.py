"""Whether the files of a checkpoint folder are those that were written: sizes by every rank, sha256 shared by all."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_hgpt.checkpoint.description import INFO, read_info
from megatron_hgpt.errors import CheckpointError, reason_of


def wrong_sizes(folder: Path, info: Mapping[str, Any]) -> str | None:
    """The first file that is missing, no file or of another size than the description says, as a text; None where all
    fit. A link to a file counts as that file."""
    for name, entry in info["files"].items():
        path = folder / name
        try:
            status = path.stat()
        except OSError as error:
            return f"{path}: {reason_of(error)}"
        if not stat.S_ISREG(status.st_mode):  # a pipe, whose reader waits for ever; a device, which never ends
            return f"{path}: not an ordinary file"
        if status.st_size != entry["bytes"]:
            return f"{path}: {status.st_size} bytes, {INFO} says {entry['bytes']}"
    return None


def wrong_content(folder: Path, info: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of the named files whose sha256 is another one than the description says, as a text."""
    for name in names:
        path = folder / name
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            return f"{path}: {reason_of(error)}"
        if digest != info["files"][name]["sha256"]:
            return f"{path}: its sha256 is not the one in {INFO}"
    return None


def share_of(info: Mapping[str, Any], rank: int, world_size: int) -> list[str]:
    """The files that one rank reads for all: each file is some rank's, and all ranks read about as many bytes."""
    loads, mine = [0] * world_size, []
    for name, entry in sorted(info["files"].items(), key=lambda item: (-item[1]["bytes"], item[0])):
        reader = loads.index(min(loads))
        loads[reader] += entry["bytes"]
        if reader == rank:
            mine.append(name)
    return mine


def verify_checkpoint(folder: Path) -> bool:
    """Compare every file of a checkpoint folder with its description, in this process alone.

    Returns:
        False where there is nothing to compare: formats 1 and 2 have no checksums.

    Raises:
        CheckpointError: it is no checkpoint, or is damaged.
    """
    remedy = "put an intact copy back"
    try:
        info = read_info(folder)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("use another checkpoint", remedy)) from error
    if problem := wrong_sizes(folder, info) or wrong_content(folder, info, info["files"]):
        raise CheckpointError(f"the checkpoint is damaged: {problem}; {remedy}")
    return bool(info["files"])
