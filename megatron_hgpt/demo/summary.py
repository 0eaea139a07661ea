"""What the demo prints at its end: figures of each split, and what one can do with the trained model."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hgpt.demo.questions import EXAMPLE_QUESTION
from megatron_hgpt.errors import DataError

_VQA_FIGURES = (
    "exact_match", "baseline_exact_match", "open_exact_match", "open_baseline", "closed_accuracy", "closed_baseline",
)  # fmt: skip
EXAMPLE_SERIES = "fundus"
"""Of `mini_sources`."""


def results_table(folders: Mapping[str, Path]) -> str:
    """One line per split: exact match (all, open, yes-or-no questions) beside the baseline's, PSNR beside the VQGAN's.

    Args:
        folders: split as shown -> folder of `evaluation.store.save_results`.
    """
    figures = ["right", "baseline", "open", "baseline", "yes/no", "baseline"]
    head = ["", "questions", *figures, "pictures", "PSNR", "VQ limit"]
    rows = [
        _row(name, json.loads((folder / "results.json").read_text())["summary"]) for name, folder in folders.items()
    ]
    return _columns([head, *rows]) + (
        "\nbaseline: every question gets the most frequent training answer to questions of its type"
        "\nVQ limit: the target itself through the VQGAN, the best that correct image tokens can give"
    )


def _row(name: str, summary: Mapping[str, Any]) -> list[str]:
    vqa, images = summary["vqa"], summary["images"]
    psnr = [images[key] and images[key]["psnr_db"] for key in ("output_vs_target", "round_trip_vs_target")]
    return [
        name,
        str(vqa["num_questions"] or "–"),
        *(_format(vqa[name], ".1%") for name in _VQA_FIGURES),
        str(images["num_images"] or "–"),
        *(_format(value, ".1f", " dB") for value in psnr),
    ]


def _format(value: float | None, spec: str, unit: str = "") -> str:
    return "–" if value is None else format(value, spec) + unit


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


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
