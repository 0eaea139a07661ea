"""Numbers as the console and the report show them, and as TensorBoard and its like name them."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_hgpt.hooks.base import StepRecord, ValidationRecord


def duration(seconds: float) -> str:
    """``12.3 s``, ``4 min 05 s``, ``2 h 07 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def losses(loss: float, per_task: Mapping[str, float], num_samples: Mapping[str, int] | None = None) -> str:
    """``1.2345``, with the tasks in brackets where there are two, and the samples of each where they are given."""
    counts = {task: f" on {n:,}" for task, n in (num_samples or {}).items()}
    parts = [f"{task} {value:.4f}{counts.get(task, '')}" for task, value in per_task.items()]
    return f"{loss:.4f}" + (f" ({', '.join(parts)})" if len(parts) > 1 or counts else "")


def step_scalars(record: StepRecord) -> dict[str, float]:
    """Name -> value of one step, the same names in every logger."""
    return {
        "loss/all": record.loss,
        **{f"loss/{task}": loss for task, loss in record.loss_per_task.items()},
        **{f"learning_rate/{group}": rate for group, rate in record.learning_rates.items()},
        "grad_norm": record.grad_norm,
        "throughput/tokens_per_s": record.tokens_per_s,
        "throughput/step_time_s": record.step_time_s,
        "throughput/padding_share": record.padding_share,
    }


def validation_scalars(record: ValidationRecord) -> dict[str, float]:
    """Name -> value of one validation, the same names in every logger."""
    return {
        "validation_loss/all": record.loss,
        **{f"validation_loss/{task}": loss for task, loss in record.loss_per_task.items()},
    }
