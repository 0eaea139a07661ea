"""The table of commands: a new one is a file in this package and a row here.

A command's module has

    HELP                      one line, for ``hgpt --help``
    EXAMPLES                  lines that a user may copy, for the end of ``hgpt <command> --help``
    NOTES                     what a user must know beside the options; may be empty
    add_arguments(parser)     its own options; `frame.add_configuration` or `frame.add_overrides` for the shared ones
    run(arguments)            does it; returns the exit status, None is 0

and may have LOG_LEVEL, the least severe of the package's log records that it shows (default: logging.INFO). It imports
torch, and what imports torch, inside `run`: help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Protocol, cast


class Command(Protocol):
    """What a command's module offers."""

    HELP: str
    EXAMPLES: str
    NOTES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own options."""

    def run(self, arguments: argparse.Namespace) -> int | None:
        """Do it.

        Raises:
            HealthGPTError: a mistake of the user's; the frame prints it as one line.
        """


COMMANDS = (
    "preprocess",
    "cache-features",
    "verify",
    "train",
    "generate",
    "evaluate",
    "report",
    "plan",
    "config",
    "demo",
    "train-vqgan",
)
"""In the order of a project's life; each is the module of its name in this package, with _ for -."""


def command_named(name: str) -> Command:
    """The command's module, imported now."""
    return cast(Command, importlib.import_module(f"megatron_hgpt.cli.{name.replace('-', '_')}"))
