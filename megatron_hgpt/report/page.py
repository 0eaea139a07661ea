"""One self-contained HTML page about a training: curves of its stages, answers, drawn images, configuration.

The page needs no network and no script; every text from data or model is escaped, every image is inlined.
"""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_hgpt import __version__
from megatron_hgpt.evaluation.image import image_metrics, summarise_images
from megatron_hgpt.evaluation.store import Evaluation, ImageResult, VQAResult, load_results
from megatron_hgpt.evaluation.vqa import is_exact_match, summarise_vqa
from megatron_hgpt.files import write_atomic
from megatron_hgpt.hooks.figures import duration
from megatron_hgpt.report.pieces import number, table
from megatron_hgpt.report.style import STYLE
from megatron_hgpt.report.training import Run, read_run, training_section

MAX_QUESTIONS = 30
"""Questions shown per split."""

MAX_DRAWINGS = 12
"""Drawn images shown per split."""

_PACKAGES = ("torch", "megatron-core", "transformers", "numpy")


def write_report(
    path: Path,
    *,
    runs: Sequence[Path],
    evaluations: Mapping[str, Path],
    title: str,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write the page to `path`.

    Args:
        runs: output folders of the stages in their order, each with metrics.jsonl, summary.json and
            resolved_config.yaml, and validation.jsonl where the stage had held-out data.
        evaluations: name of a split as shown -> folder of `evaluation.store.save_results`; the first is the headline.
        notes: name -> text shown as facts about the run (command, device, commit …).

    Raises:
        DataError: a folder lacks one of these files or holds a damaged one.
    """
    stages = [read_run(folder) for folder in runs]
    splits = {name: load_results(folder) for name, folder in evaluations.items()}
    vqa = {name: summarise_vqa(split.vqa) for name, split in splits.items() if split.vqa}
    drawn = {name: summarise_images(split.images) for name, split in splits.items() if split.images}
    sections = [
        ("training", "Training", training_section(stages)),
        ("answers", "Questions and answers", _answers(vqa, splits)),
        ("images", "Drawn images", _drawings(drawn, splits)),
        ("setup", "Configuration and environment", _setup(stages, notes or {})),
    ]
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in sections)
    body = "".join(f'<section id="{anchor}"><h2>{name}</h2>{html}</section>' for anchor, name, html in sections)
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><div><h1>{escape(title)}</h1><div class="soft">{date}</div>{_cards(stages, vqa, drawn)}'
        f'<nav aria-label="Sections">{nav}</nav></div></header><main>{body}</main>'
        f"<footer>megatron_hgpt {__version__}</footer></body></html>\n"
    )
    write_atomic(path, page)


# ------------------------------------------------------------------------------------------------- headline


def _cards(stages: Sequence[Run], vqa: Mapping[str, Any], drawn: Mapping[str, Any]) -> str:
    cards = [
        (f"{s['exact_match']:.1%}", "VQA exact match", f"{name}, {s['num_questions']} questions")
        for name, s in vqa.items()
    ]
    cards += [
        (f"{s['output_vs_target']['psnr_db']:.2f} dB", "PSNR of drawn images", _gap_text(name, s["psnr_gap_db"]))
        for name, s in drawn.items()
    ]
    if stages:
        wall_s = sum(run.summary["wall_s"] for run in stages)
        steps = sum(run.summary["steps"] for run in stages)
        cards.append((duration(wall_s), "Training time", f"{len(stages)} stages, {steps:,} steps"))
    items = "".join(f"<li><b>{b}</b><span>{label}</span><small>{escape(s)}</small></li>" for b, label, s in cards)
    return f'<ul class="cards">{items}</ul>'


def _gap_text(name: str, gap_db: float) -> str:
    relation = "below" if gap_db >= 0 else "above"
    return f"{name}, {abs(gap_db):.2f} dB {relation} the VQ round trip"


# ------------------------------------------------------------------------------------------------- answers


def _answers(summaries: Mapping[str, Any], splits: Mapping[str, Evaluation]) -> str:
    if not summaries:
        return "<p>No questions were evaluated.</p>"
    head = [
        "Split",
        "Questions",
        "Exact match",
        "Baseline",
        "Closed accuracy",
        "Open exact match",
        "Open recall",
        "Open F1",
    ]
    fields = (
        "exact_match",
        "baseline_exact_match",
        "closed_accuracy",
        "open_exact_match",
        "open_recall",
        "open_token_f1",
    )
    rows = [[n, f"{s['num_questions']:,}", *(number(s[f], ".1%") for f in fields)] for n, s in summaries.items()]
    types = sorted({name for s in summaries.values() for name in s["by_question_type"]})
    by_type = table(
        ["Question type", *(f"{name} (questions)" for name in summaries)],
        [[kind, *(_type_cell(s["by_question_type"].get(kind)) for s in summaries.values())] for kind in types],
    )
    lists = "".join(_question_list(name, splits[name].vqa) for name in summaries)
    return (
        f"{table(head, rows)}<p class='soft'>Exact match compares lower-case answers without punctuation and "
        "articles. The baseline never looks: it gives every question the most frequent training answer to questions of "
        "its type. Closed questions are those with a yes or no as reference.</p>"
        f"<details><summary>Exact match by question type</summary>{by_type}</details>{lists}"
    )


def _type_cell(summary: Mapping[str, Any] | None) -> str:
    if not summary:
        return "–"
    baseline = summary["baseline_exact_match"]
    beside = "" if baseline is None else f"; baseline {baseline:.1%}"
    return f"{summary['exact_match']:.1%} ({summary['num_questions']}{beside})"


def _question_list(name: str, results: Sequence[VQAResult]) -> str:
    wrong_first = sorted(results, key=lambda r: is_exact_match(r.expected, r.given))
    shown = wrong_first[:MAX_QUESTIONS]
    num_wrong = sum(not is_exact_match(r.expected, r.given) for r in results)
    caption = (
        f"{len(results) - num_wrong} right, {num_wrong} wrong. Shown: {len(shown)} of {len(results)}, wrong ones first."
    )
    items = "".join(_question(result) for result in shown)
    return f'<h3>{escape(name)}</h3><p class="soft">{caption}</p><ul class="qa">{items}</ul>'


def _question(result: VQAResult) -> str:
    right = is_exact_match(result.expected, result.given)
    question = result.question.replace("<image>", "").strip()
    image = (
        _img(result.image, f"image of sample {result.sample_id}", max_side=144) or '<div class="none">no image</div>'
    )
    return (
        f'<li class="{"right" if right else "wrong"}"><div>{image}</div><div><p>{escape(question)}</p>'
        f"<dl><dt>Expected</dt><dd>{escape(result.expected)}</dd>"
        f"<dt>Given</dt><dd>{escape(result.given) or '<i>nothing</i>'}</dd></dl>"
        f'<span class="mark">{"✓ right" if right else "✗ wrong"}</span></div></li>'
    )


# ------------------------------------------------------------------------------------------------- images


def _drawings(summaries: Mapping[str, Any], splits: Mapping[str, Evaluation]) -> str:
    if not summaries:
        return "<p>No images were drawn.</p>"
    head = ["Split", "Images", "PSNR (dB)", "SSIM", "MSE", "Round trip PSNR (dB)", "Round trip SSIM", "Gap (dB)"]
    rows = []
    for name, summary in summaries.items():
        rows.append(_drawing_row(name, summary))
        if len(summary["by_kind"]) > 1:
            rows += [_drawing_row(f"{name}: {_words(kind)}", s) for kind, s in summary["by_kind"].items()]
    grids = "".join(_drawing_grid(name, splits[name].images) for name in summaries)
    return (
        f"{table(head, rows)}<p class='soft'>All figures are against the target, on 8-bit values, averaged over "
        "images. The VQ round trip encodes and decodes the target itself: the best that correct image tokens can give. "
        f"The gap is its PSNR minus the model's.</p>{grids}"
    )


def _drawing_row(name: str, summary: Mapping[str, Any]) -> list[str]:
    output, round_trip = summary["output_vs_target"], summary["round_trip_vs_target"]
    return [
        name,
        f"{summary['num_images']:,}",
        f"{output['psnr_db']:.2f}",
        f"{output['ssim']:.3f}",
        f"{output['mse']:.1f}",
        f"{round_trip['psnr_db']:.2f}",
        f"{round_trip['ssim']:.3f}",
        f"{summary['psnr_gap_db']:.2f}",
    ]


def _drawing_grid(name: str, results: Sequence[ImageResult]) -> str:
    count = min(len(results), MAX_DRAWINGS)
    shown = [results[i * len(results) // count] for i in range(count)]
    rows = "".join(_drawing(result) for result in shown)
    caption = f"{count} of {len(results)}, evenly spaced."
    return f'<h3>{escape(name)}</h3><p class="soft">{caption}</p><div class="grid wide">{rows}</div>'


def _drawing(result: ImageResult) -> str:
    figures = [("Input", result.input, ""), ("Target", result.target, "")]
    for label, image in (("VQ round trip", result.round_trip), ("Model", result.output)):
        m = image_metrics(image, result.target)
        figures.append((label, image, f"{m['psnr_db']:.2f} dB<br>SSIM {m['ssim']:.3f}"))
    cells = "".join(
        f"<figure>{_img(image, f'{label} of sample {result.sample_id}') or '<div class=none>none</div>'}"
        f"<figcaption><b>{label}</b>{metrics}</figcaption></figure>"
        for label, image, metrics in figures
    )
    instruction = escape(result.instruction.replace("<image>", "").strip())
    kind = f" <span>{escape(_words(result.kind))}</span>" if result.kind else ""
    return (
        f'<figure class="drawing"><figcaption>{instruction}{kind}</figcaption><div class="four">{cells}</div></figure>'
    )


# ------------------------------------------------------------------------------------------------- setup


def _setup(stages: Sequence[Run], notes: Mapping[str, str]) -> str:
    facts = {
        **notes,
        "Python": platform.python_version(),
        "System": f"{platform.system()} {platform.machine()}",
        "Packages": ", ".join([f"megatron_hgpt {__version__}", *(f"{name} {_version(name)}" for name in _PACKAGES)]),
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    configs = "".join(
        f"<details><summary>Resolved configuration of {escape(str(run.summary['stage']))}</summary>"
        f"<pre>{escape(run.config_yaml)}</pre></details>"
        for run in stages
    )
    return f'<dl class="facts">{items}</dl>{configs}'


# ------------------------------------------------------------------------------------------------- pieces


def _img(image: Image.Image | None, alt: str, *, max_side: int = 512) -> str:
    """An inline PNG of at most `max_side` pixels a side; empty for None."""
    if image is None:
        return ""
    if max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def _words(identifier: str) -> str:
    return identifier.replace("_", " ")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
