"""Names of checkpoint folders: given once a folder is whole, and taken away again.

``step_<8 digits>`` is a whole checkpoint. While one is written, or removed, its folder ends in ``.tmp``; one that makes
way for another of the same step ends in ``.old`` until that one has its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hgpt.checkpoint.description import INFO, checkpoint_folders, publication_of, read_info
from megatron_hgpt.checkpoint.shards import HashedFile, Shard, write_metadata
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import dump
from megatron_hgpt.errors import CheckpointError, reason_of
from megatron_hgpt.files import free_bytes, sealed, sync_folder
from megatron_hgpt.rounding import file_size

logger = logging.getLogger(__name__)

_OVERHEAD = 2048
"""Bytes around the values of one chunk in its file and in `.metadata`, at most."""


def bytes_on_disk(num_bytes: int, num_chunks: int) -> int:
    """What chunks of so many bytes take in a checkpoint."""
    return num_bytes + num_chunks * _OVERHEAD


def folder_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step goes."""
    return directory / f"step_{step:08d}"


def lacking_room(directory: Path, needed: int) -> str | None:
    """Why a checkpoint of `needed` bytes cannot be written, as far as it is known before; None where it can.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".probe-{os.getpid()}"
    probe.touch()
    probe.unlink()
    free = free_bytes(directory)
    if free < needed:
        return f"one takes {file_size(needed)}, and {file_size(free)} are free there"
    return None


def settle_leftovers(directory: Path) -> None:
    """Put right what a run left that was killed in a save: unfinished folders go, a whole one gets its name back."""
    for path in sorted(directory.glob("step_*")) if directory.is_dir() else ():
        match = re.fullmatch(r"(step_\d{8})(\.\w+)?\.(tmp|old)", path.name)
        if match is None:
            continue
        name, _, kind = match.groups()
        try:
            if kind == "old" and not (directory / name).exists():
                path.rename(directory / name)
                logger.warning(
                    "%s is back in its place: a save that was to replace it was interrupted", directory / name
                )
            else:
                logger.warning("removing %s, which an interrupted save left unfinished", path)
                shutil.rmtree(path)
        except OSError as error:
            logger.warning("%s, which an interrupted save left, stays: %s", path, reason_of(error))


def describe(
    folder: Path, info: dict[str, Any], config: RunConfig, shards: Sequence[Shard], *, publication: int
) -> int:
    """Write what a folder of complete shards still lacks: `.metadata`, the configuration, its description.

    Returns:
        Bytes of all files.
    """
    write_metadata(folder, shards)
    with HashedFile(folder / "resolved_config.yaml") as file:
        file.write(dump(config).encode())
    files: dict[str, Any] = {shard.file: {"bytes": shard.num_bytes, "sha256": shard.sha256} for shard in shards}
    for name in (".metadata", "resolved_config.yaml"):
        with (folder / name).open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
    with HashedFile(folder / INFO) as file:
        file.write(json.dumps(sealed({**info, "publication": publication, "files": files}), indent=1).encode())
    sync_folder(folder)
    return sum(entry["bytes"] for entry in files.values()) + (folder / INFO).stat().st_size


def give_name(temporary: Path, final: Path) -> None:
    """Rename a whole folder; one that has the name already makes way first, and is removed after."""
    aside = final.with_name(f"{final.name}.old")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    try:
        sync_folder(final.parent)
    except OSError as error:
        # It has its name: a save that is called failed now would be there all the same.
        logger.warning("%s is complete, but may not outlast a loss of power: %s", final, reason_of(error))
    shutil.rmtree(aside, ignore_errors=True)


def next_publication(directory: Path) -> int:
    """One more than the last."""
    return 1 + max((publication_of(folder) or 0 for folder in checkpoint_folders(directory)), default=0)


def prune(directory: Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints published last and the healthy one published last; 0 keeps all.

    A folder whose description cannot be read stays: the disk may show it again, or its owner mend it.
    """
    if keep == 0:
        return
    infos: dict[Path, dict[str, Any]] = {}
    for folder in checkpoint_folders(directory)[::-1]:
        with contextlib.suppress(CheckpointError):
            infos[folder] = read_info(folder)
    healthy = [folder for folder, info in infos.items() if info["is_healthy"]]
    kept = {*list(infos)[:keep], *healthy[:1]}
    for folder in infos:
        if folder in kept:
            continue
        try:
            # Under its own name a folder is whole, also if the process ends in between.
            shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.pruned.tmp")))
        except OSError as error:
            logger.warning("%s, which checkpoint.keep_last no longer keeps, stays: %s", folder, reason_of(error))
