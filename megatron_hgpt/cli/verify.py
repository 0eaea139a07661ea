"""``hgpt verify``: whether the files of a dataset folder are those that were written."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_hgpt.cli import frame

HELP = "compare every file of dataset folders and their feature caches with its checksum"
EXAMPLES = """
hgpt verify data/train data/validation
"""
NOTES = """
Reads everything. Training compares indices when it opens a folder and each sample when it reads it, so this is for
after a copy, or to find the file when a sample was reported as changed. A damaged folder ends it with exit status 2.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which folders."""
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="dataset folders")


def run(arguments: argparse.Namespace) -> None:
    """Say a line for each folder that is as it was written, in order; the first that is not stops it."""
    for folder in arguments.folders:
        frame.require_folder(folder, "the argument")
    from megatron_hgpt.data.verify import verify_dataset

    for folder in arguments.folders:
        for path, num_bytes in verify_dataset(folder):
            frame.write(f"{path}: as it was written, {num_bytes / 2**20:.1f} MiB")
