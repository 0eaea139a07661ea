"""The figures of evaluated splits as a table of text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_VQA_FIGURES = (
    "exact_match", "baseline_exact_match", "open_exact_match", "open_baseline", "closed_accuracy", "closed_baseline",
)  # fmt: skip


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
