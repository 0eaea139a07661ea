"""What the demo prints at its end beside the results: one example, and what one can do with the trained model."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

from megatron_hgpt.demo.questions import EXAMPLE_QUESTION
from megatron_hgpt.errors import DataError

EXAMPLE_SERIES = "fundus"
"""Of `mini_sources`."""


def example(dataset: Path) -> tuple[Path, str]:
    """The first held-out part of the eye's photograph, and its modality: not the most frequent answer in training.

    Raises:
        DataError: there is none.
    """
    card = json.loads((dataset / "sources.json").read_text())
    for picture in card["pictures"]:
        if picture["split"] == "test" and picture["series"] == EXAMPLE_SERIES:
            return dataset / picture["image"], picture["facts"]["modality"]
    raise DataError(
        f"{dataset / 'sources.json'} has no held-out picture of {EXAMPLE_SERIES!r}; build the dataset again"
    )


def next_steps(output: Path, image: Path) -> str:
    """Commands that one can paste, from the folder that the demo was started in."""
    installed = Path(sys.executable).with_name("hgpt")
    hgpt = shlex.quote(_short(installed)) if installed.exists() else f"{_short(Path(sys.executable))} -m megatron_hgpt"
    ask = f"{hgpt} generate --checkpoint {_quoted(output / 'stage3')} --image {_quoted(image)}"
    board = _quoted(Path(sys.executable).with_name("tensorboard"))
    return "\n".join(
        [
            "ask        " + f'{ask} --question "{EXAMPLE_QUESTION}"',
            "draw       " + f'{ask} --question "Reconstruct the image." --draw {_quoted(output / "drawn.png")}',
            "look       " + f"open {_quoted(output / 'report.html')} in a browser; {board} --logdir {_quoted(output)}",
            "your data  docs/guide.md: from your models and pictures to a trained model, command by command",
        ]
    )


def _short(path: Path) -> str:
    return min(os.path.relpath(path), str(path), key=len)


def _quoted(path: Path) -> str:
    return shlex.quote(_short(path))
