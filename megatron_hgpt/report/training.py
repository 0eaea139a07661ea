"""The section about training: a table of the stages, and curves of losses and learning rates."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hgpt.errors import DataError, reason_of
from megatron_hgpt.hooks.figures import duration
from megatron_hgpt.hooks.metrics import read_metrics, read_validations
from megatron_hgpt.report.charts import Series, line_chart
from megatron_hgpt.report.pieces import number, table

_TASKS = ("comprehension", "generation")


@dataclass(kw_only=True, slots=True)
class Run:
    """What one stage left in its output folder."""

    metrics: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    """Empty where the stage had no held-out data, or comes from a version that did not use it."""
    summary: dict[str, Any]
    config_yaml: str


def read_run(folder: Path) -> Run:
    """Read a stage's files.

    Raises:
        DataError: one of them is missing (validation.jsonl may be) or damaged.
    """
    metrics, validations = read_metrics(folder / "metrics.jsonl"), read_validations(folder)
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        missing = {"stage", "steps", "first_loss", "last_loss", "wall_s", "tokens_per_s"} - summary.keys()
        if missing:
            raise ValueError(f"without {', '.join(sorted(missing))}")
        path = folder / "resolved_config.yaml"
        config_yaml = path.read_text(encoding="utf-8")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: cannot be read ({reason_of(error)}); the stage has to run to its end first"
        ) from error
    return Run(metrics=metrics, validations=validations, summary=summary, config_yaml=config_yaml)


def training_section(stages: Sequence[Run]) -> str:
    """The section's HTML."""
    if not stages:
        return "<p>No training run was given.</p>"
    losses = "".join(
        line_chart([*_training_losses(run), *_validation_losses(run)], title=run.summary["stage"], y_label="loss")
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
    held_out = " Rings are the loss of the held-out samples, without dropout." if _any_validation(stages) else ""
    return (
        f"{_stage_table(stages)}<h3>Loss</h3><p class='soft'>Mean cross-entropy per supervised token, in nats: each "
        f"logged step faint, running mean over a tenth of the steps on top.{held_out}</p>"
        f'<div class="grid">{losses}</div><h3>Learning rate</h3><div class="grid">{rates}</div>'
    )


def _any_validation(stages: Sequence[Run]) -> bool:
    return any(run.validations for run in stages)


def _stage_table(stages: Sequence[Run]) -> str:
    head = ["Stage", "Steps", "First loss", "Last loss"]
    fields = (
        ("first_validation_loss", "last_validation_loss", "best_validation_loss") if _any_validation(stages) else ()
    )
    head += ["First validation", "Last validation", "Best validation"][: len(fields)]
    head += ["Wall time", "Tokens/s", "Median gradient norm"]
    rows = [
        [
            run.summary["stage"],
            f"{run.summary['steps']:,}",
            number(run.summary["first_loss"], ".3f"),
            number(run.summary["last_loss"], ".3f"),
            *(number(run.summary.get(field), ".3f") for field in fields),
            duration(run.summary["wall_s"]),
            number(run.summary["tokens_per_s"], ",.0f"),
            number(_median_grad_norm(run.metrics), ".3g"),
        ]
        for run in stages
    ]
    return table(head, rows)


def _training_losses(run: Run) -> list[Series]:
    if any(f"loss_{task}" in record for task in _TASKS for record in run.metrics):
        return [_series(run.metrics, f"loss_{task}", task, task, smooth=True) for task in _TASKS]
    return [_series(run.metrics, "loss", "all", "all", smooth=True)]


def _validation_losses(run: Run) -> list[Series]:
    return [
        _series(run.validations, f"loss_{task}", f"{task}, held out", f"{task} held-out", markers=True)
        for task in _TASKS
    ]


def _series(
    records: Iterable[Mapping[str, Any]],
    field: str,
    label: str,
    css_class: str,
    *,
    smooth: bool = False,
    markers: bool = False,
) -> Series:
    points = [(float(m["step"]), float(m[field])) for m in records if m.get(field) is not None]
    return Series(label=label, points=points, css_class=css_class, smooth=smooth, markers=markers)


def _median_grad_norm(metrics: Iterable[Mapping[str, Any]]) -> float | None:
    norms = [m["grad_norm"] for m in metrics if m.get("grad_norm") is not None]
    return statistics.median(norms) if norms else None
