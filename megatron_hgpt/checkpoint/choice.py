"""Which checkpoint is read: the first rank chooses, every rank sees that very one, and a damaged one gives way.

Ranks that each took the newest folder of their own listing could go on from different steps where a network file
system shows a new folder late, and the replicas of a weight would differ from then on without a word.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hgpt.checkpoint.agreement import from_first, gathered, place_of_rank
from megatron_hgpt.checkpoint.description import checkpoint_folders, folders_of, read_info
from megatron_hgpt.checkpoint.integrity import share_of, wrong_content, wrong_sizes
from megatron_hgpt.checkpoint.metadata_file import METADATA, Contents, read_contents, read_metadata_file
from megatron_hgpt.errors import CheckpointError

logger = logging.getLogger(__name__)

VIEW_S = 30.0
"""How long a rank looks for what the first one sees: file systems of several nodes show new files some seconds late."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenCheckpoint:
    """A checkpoint that every rank sees alike, its files verified."""

    folder: Path
    info: dict[str, Any]
    """`read_info` of it."""
    contents: Contents


def open_newest(directory: Path, *, healthy_only: bool = False) -> OpenCheckpoint | None:
    """The newest checkpoint in a folder that is whole; None where there is none. Every rank must call it.

    Args:
        directory: of ``step_*`` folders; each rank may see it under a path of its own.
        healthy_only: leave out checkpoints that were saved right after a loss spike.

    Raises:
        CheckpointError: all are damaged and none was left out, or ranks do not see the same.
    """
    names = from_first(lambda: [folder.name for folder in checkpoint_folders(directory)[::-1]])
    return _open_first([directory / name for name in names], healthy_only=healthy_only)


def open_checkpoint(path: Path) -> OpenCheckpoint:
    """A checkpoint folder itself, or the newest one of a run folder that is whole; every rank must call it.

    Raises:
        CheckpointError: there is none, it is damaged, or ranks do not see the same.
    """
    relative = from_first(lambda: [str(folder.relative_to(path)) for folder in folders_of(path)])
    found = _open_first([path / name for name in relative])
    assert found is not None  # folders_of names one at least
    return found


def _open_first(folders: Sequence[Path], *, healthy_only: bool = False) -> OpenCheckpoint | None:
    damaged: list[str] = []
    unhealthy: list[Path] = []
    for folder in folders:
        try:
            found = _open(folder, healthy_only=healthy_only)
        except _DamageError as error:
            damaged.append(str(error))
            continue
        if found is None:
            unhealthy.append(folder)
            continue
        for left_out in unhealthy:
            logger.warning("%s was saved right after a loss spike: %s is used instead", left_out, folder)
        for reason in damaged:
            logger.warning("%s: %s is used instead", reason.split("; use another")[0], folder)
        return found
    if unhealthy:
        for reason in damaged:
            logger.warning("%s", reason)
        return None
    if len(damaged) == 1 and len(folders) == 1:
        raise CheckpointError(damaged[0])
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {folders[0].parent} can be used: {damaged[0]}. Put an intact "
            "copy back, or begin anew with another output_dir"
        )
    return None


class _DamageError(CheckpointError):
    """A checkpoint that no rank can use: an earlier one takes its place."""


def _open(folder: Path, *, healthy_only: bool) -> OpenCheckpoint | None:
    """One checkpoint, verified over all ranks; None where it is left out.

    Raises:
        _DamageError: on every rank.
        CheckpointError: some rank does not see what the first one sees; on every rank.
    """
    digest, reason = from_first(lambda: _first_look(folder, healthy_only=healthy_only))
    if reason is not None:
        raise _DamageError(reason)
    if digest is None:
        return None
    opened, unseen, reason = None, None, None
    try:
        opened = _see(folder, digest)
    except _DamageError as error:
        reason = str(error)
    except CheckpointError as error:
        unseen = f"{place_of_rank()}: {error}"
    for unseen_there, reason_there in gathered((unseen, reason)):
        if unseen_there is not None:
            raise CheckpointError(
                f"ranks do not see the same checkpoint {folder}: {unseen_there}. It must lie on storage that all nodes "
                "share, under the same path"
            )
        reason = reason or reason_there
    if reason is not None:
        raise _DamageError(reason)
    return opened


def _first_look(folder: Path, *, healthy_only: bool) -> tuple[str | None, str | None]:
    """The digest of a folder's description, or why it is damaged; neither where it is left out."""
    try:
        info = read_info(folder)
    except CheckpointError as error:
        return None, str(error)
    if healthy_only and not info["is_healthy"]:
        return None, None
    problem = wrong_sizes(folder, info)
    if problem is None and not (folder / METADATA).is_file():
        problem = f"{METADATA} is missing"
    if problem is not None:
        return None, f"{folder} is damaged: {problem}; use another checkpoint"
    if not info["files"]:
        logger.warning(
            "%s is of format %d and has no checksums: damage to it would not show", folder, info["format_version"]
        )
    return info["digest"], None


def _see(folder: Path, digest: str) -> OpenCheckpoint:
    """The checkpoint in this rank's view, after its share of the hashing.

    Raises:
        _DamageError: a file holds something else than was written.
        CheckpointError: this rank does not see what the first one sees, not even after `VIEW_S`.
    """
    info = _wait_for(lambda: _same_info(folder, digest))
    names = [name for name in share_of(info, *_rank_and_size()) if name != METADATA]
    problem = wrong_content(folder, info, names)
    content = read_metadata_file(folder)
    # Each rank hashes the very bytes that it unpickles.
    if info["files"] and hashlib.sha256(content).hexdigest() != info["files"][METADATA]["sha256"]:
        problem = f"{folder / METADATA}: its sha256 is not the one in its description"
    if problem is not None:
        raise _DamageError(f"{folder} is damaged: {problem}; use another checkpoint")
    try:
        contents = read_contents(folder, content)
    except CheckpointError as error:
        raise _DamageError(str(error)) from error
    unknown = {place.file for place in contents.places.values()} - info["files"].keys()
    if info["files"] and unknown:
        raise _DamageError(f"{folder} is damaged: {sorted(unknown)[0]} has no checksum; use another checkpoint")
    return OpenCheckpoint(folder=folder, info=info, contents=contents)


def _same_info(folder: Path, digest: str) -> dict[str, Any]:
    info = read_info(folder)
    if info["digest"] != digest:
        raise CheckpointError(f"{folder} is another one than the first rank's (step {info['step']})")
    if problem := wrong_sizes(folder, info):
        raise CheckpointError(problem)
    return info


def _wait_for(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `look` returns once it no longer raises; its error after `VIEW_S`."""
    deadline = time.monotonic() + VIEW_S
    while True:
        try:
            return look()
        except CheckpointError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _rank_and_size() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
