"""``hgpt verify``: whether the files of a dataset, a checkpoint or a run are those that were written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_hgpt.cli import frame
from megatron_hgpt.errors import HealthGPTError

HELP = "compare every file of datasets and checkpoints with its checksum"
EXAMPLES = """
hgpt verify data/train data/validation
hgpt verify runs/my_run
"""
NOTES = """
Reads everything. Training compares a checkpoint before it goes on from it, a dataset's indices when it opens the
folder and each sample when it reads it, so this is for after a copy, or to find the file when a sample was reported as
changed. Of a run's folder it compares all checkpoints. It goes through all folders, says a line for each, the damaged
ones on stderr, and then ends with exit status 2 if there was one.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which folders."""
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of datasets, checkpoints or runs")


def run(arguments: argparse.Namespace) -> int:
    """Say a line for each folder, in order, on stderr for those that are not as they were written."""
    for folder in arguments.folders:
        frame.require_folder(folder, "the argument")
    status = 0
    for folder in arguments.folders:
        for path, verify in _parts(folder):
            try:
                frame.write(f"{path}: {verify(path)}")
            except HealthGPTError as error:
                status = frame.report_error(error, verbose=arguments.verbose)
    return status


def _parts(folder: Path) -> list[tuple[Path, Callable[[Path], str]]]:
    """The checkpoints in a folder, or the dataset that it is and its feature caches, and what compares each."""
    from megatron_hgpt.checkpoint.description import INFO, checkpoint_folders
    from megatron_hgpt.data.verify import feature_caches

    is_checkpoint = (folder / INFO).is_file() or folder.name.startswith("step_")
    checkpoints = [folder] if is_checkpoint else checkpoint_folders(folder) + checkpoint_folders(folder / "checkpoints")
    if checkpoints:
        return [(checkpoint, _checkpoint) for checkpoint in checkpoints]
    return [(folder, _dataset), *((cache, _cache) for cache in feature_caches(folder))]


def _checkpoint(folder: Path) -> str:
    from megatron_hgpt.checkpoint.integrity import verify_checkpoint

    return "as it was written" if verify_checkpoint(folder) else "of an earlier version, without checksums"


def _dataset(folder: Path) -> str:
    from megatron_hgpt.data.verify import verify_dataset

    return _written(verify_dataset(folder))


def _cache(folder: Path) -> str:
    from megatron_hgpt.data.verify import verify_cache

    return _written(verify_cache(folder))


def _written(num_bytes: int) -> str:
    return f"as it was written, {num_bytes / 2**20:.1f} MiB"
