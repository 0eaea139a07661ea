"""``hgpt verify``: whether the files of a dataset, a checkpoint or a run are those that were written."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_hgpt.cli import frame

HELP = "compare every file of datasets and checkpoints with its checksum"
EXAMPLES = """
hgpt verify data/train data/validation
hgpt verify runs/my_run
"""
NOTES = """
Reads everything. Training compares a checkpoint before it goes on from it, a dataset's indices when it opens the
folder and each sample when it reads it, so this is for after a copy, or to find the file when a sample was reported as
changed. Of a run's folder it compares all checkpoints. A damaged folder ends it with exit status 2.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which folders."""
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of datasets, checkpoints or runs")


def run(arguments: argparse.Namespace) -> None:
    """Say a line for each folder that is as it was written, in order; the first that is not stops it."""
    for folder in arguments.folders:
        frame.require_folder(folder, "the argument")
    for folder in arguments.folders:
        for line in _lines(folder):
            frame.write(line)


def _lines(folder: Path) -> Iterator[str]:
    """One line for each dataset, feature cache and checkpoint in a folder.

    Raises:
        DataError, CheckpointError: it is none of these, or a file is missing, cut or changed.
    """
    from megatron_hgpt.checkpoint.description import INFO, checkpoint_folders
    from megatron_hgpt.checkpoint.integrity import verify_checkpoint
    from megatron_hgpt.data.verify import verify_dataset

    is_checkpoint = (folder / INFO).is_file() or folder.name.startswith("step_")
    checkpoints = [folder] if is_checkpoint else checkpoint_folders(folder) + checkpoint_folders(folder / "checkpoints")
    for checkpoint in checkpoints:
        has_checksums = verify_checkpoint(checkpoint)
        yield f"{checkpoint}: {'as it was written' if has_checksums else 'of an earlier version, without checksums'}"
    for path, num_bytes in verify_dataset(folder) if not checkpoints else ():
        yield f"{path}: as it was written, {num_bytes / 2**20:.1f} MiB"
