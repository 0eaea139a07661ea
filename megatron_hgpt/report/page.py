"""One self-contained HTML page about a training: curves of its stages, answers, drawn images, configuration.

The page needs no network and no script; every text from data or model is escaped, every image is inlined.
"""

from __future__ import annotations

import base64
import io
import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_hgpt import __version__
from megatron_hgpt.errors import DataError
from megatron_hgpt.evaluation.image import image_metrics, summarise_images
from megatron_hgpt.evaluation.store import Evaluation, ImageResult, VQAResult, load_results
from megatron_hgpt.evaluation.vqa import is_exact_match, summarise_vqa
from megatron_hgpt.files import write_atomic
from megatron_hgpt.hooks.metrics import read_metrics
from megatron_hgpt.report.charts import Series, line_chart
from megatron_hgpt.report.style import STYLE

MAX_QUESTIONS = 30
"""Questions shown per split."""

MAX_DRAWINGS = 12
"""Drawn images shown per split."""

_PACKAGES = ("torch", "megatron-core", "transformers", "numpy")
_TASKS = ("comprehension", "generation")


@dataclass(kw_only=True, slots=True)
class _Run:
    """What one stage left in its output folder."""

    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    config_yaml: str


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
            resolved_config.yaml.
        evaluations: name of a split as shown -> folder of `evaluation.store.save_results`; the first is the headline.
        notes: name -> text shown as facts about the run (command, device, commit …).

    Raises:
        DataError: a folder lacks one of these files or holds a damaged one.
    """
    stages = [_read_run(folder) for folder in runs]
    splits = {name: load_results(folder) for name, folder in evaluations.items()}
    vqa = {name: summarise_vqa(split.vqa) for name, split in splits.items() if split.vqa}
    drawn = {name: summarise_images(split.images) for name, split in splits.items() if split.images}
    sections = [
        ("training", "Training", _training(stages)),
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


def _read_run(folder: Path) -> _Run:
    metrics = read_metrics(folder / "metrics.jsonl")
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        missing = {"stage", "steps", "first_loss", "last_loss", "wall_s", "tokens_per_s"} - summary.keys()
        if missing:
            raise ValueError(f"without {', '.join(sorted(missing))}")
        path = folder / "resolved_config.yaml"
        return _Run(metrics=metrics, summary=summary, config_yaml=path.read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); the stage has to run to its end first") from error


# ------------------------------------------------------------------------------------------------- headline


def _cards(stages: Sequence[_Run], vqa: Mapping[str, Any], drawn: Mapping[str, Any]) -> str:
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
        cards.append((_duration(wall_s), "Training time", f"{len(stages)} stages, {steps:,} steps"))
    items = "".join(f"<li><b>{b}</b><span>{label}</span><small>{escape(s)}</small></li>" for b, label, s in cards)
    return f'<ul class="cards">{items}</ul>'


def _gap_text(name: str, gap_db: float) -> str:
    relation = "below" if gap_db >= 0 else "above"
    return f"{name}, {abs(gap_db):.2f} dB {relation} the VQ round trip"


# ------------------------------------------------------------------------------------------------- training


def _training(stages: Sequence[_Run]) -> str:
    if not stages:
        return "<p>No training run was given.</p>"
    rows = [
        [
            run.summary["stage"],
            f"{run.summary['steps']:,}",
            _number(run.summary["first_loss"], ".3f"),
            _number(run.summary["last_loss"], ".3f"),
            _duration(run.summary["wall_s"]),
            _number(run.summary["tokens_per_s"], ",.0f"),
            _number(_median_grad_norm(run.metrics), ".3g"),
        ]
        for run in stages
    ]
    head = ["Stage", "Steps", "First loss", "Last loss", "Wall time", "Tokens/s", "Median gradient norm"]
    losses = "".join(
        line_chart(
            [_series(run.metrics, f"loss_{task}", task, task, smooth=True) for task in _TASKS]
            if any(f"loss_{task}" in record for task in _TASKS for record in run.metrics)
            else [_series(run.metrics, "loss", "all", "all", smooth=True)],
            title=run.summary["stage"],
            y_label="loss",
        )
        for run in stages
    )
    rates = "".join(
        line_chart(
            [
                _series(run.metrics, "lr", "main groups", "all"),
                _series(run.metrics, "adapter_lr", "vision adapters", "generation"),
            ],
            title=run.summary["stage"],
            y_label="learning rate",
            allow_log=False,
        )
        for run in stages
    )
    return (
        f"{_table(head, rows)}<h3>Loss</h3><p class='soft'>Mean cross-entropy per supervised token, in nats: each "
        "logged step faint, running mean over a tenth of the steps on top.</p>"
        f'<div class="grid">{losses}</div><h3>Learning rate</h3><div class="grid">{rates}</div>'
    )


def _series(
    metrics: Iterable[Mapping[str, Any]], field: str, label: str, css_class: str, *, smooth: bool = False
) -> Series:
    points = [(float(m["step"]), float(m[field])) for m in metrics if m.get(field) is not None]
    return Series(label=label, points=points, css_class=css_class, smooth=smooth)


def _median_grad_norm(metrics: Iterable[Mapping[str, Any]]) -> float | None:
    norms = [m["grad_norm"] for m in metrics if m.get("grad_norm") is not None]
    return statistics.median(norms) if norms else None


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
    rows = [[n, f"{s['num_questions']:,}", *(_number(s[f], ".1%") for f in fields)] for n, s in summaries.items()]
    types = sorted({name for s in summaries.values() for name in s["by_question_type"]})
    by_type = _table(
        ["Question type", *(f"{name} (questions)" for name in summaries)],
        [[kind, *(_type_cell(s["by_question_type"].get(kind)) for s in summaries.values())] for kind in types],
    )
    lists = "".join(_question_list(name, splits[name].vqa) for name in summaries)
    return (
        f"{_table(head, rows)}<p class='soft'>Exact match compares lower-case answers without punctuation and "
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
        f"{_table(head, rows)}<p class='soft'>All figures are against the target, on 8-bit values, averaged over "
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


def _setup(stages: Sequence[_Run], notes: Mapping[str, str]) -> str:
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<div class="table"><table><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>'


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


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _words(identifier: str) -> str:
    return identifier.replace("_", " ")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
