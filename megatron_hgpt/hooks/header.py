"""What a run says before its first step: layout, parameters, data, batch arithmetic, and where things are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hgpt.batching import global_batch_size, length_in_epochs, num_micro_batches
from megatron_hgpt.rounding import plural

if TYPE_CHECKING:
    from megatron_hgpt.config import RunConfig
    from megatron_hgpt.data.loader import TrainLoader
    from megatron_hgpt.data.validation_loader import ValidationLoader
    from megatron_hgpt.distributed import DistributedContext
    from megatron_hgpt.samples import Task


def header_lines(
    config: RunConfig,
    context: DistributedContext,
    *,
    layers: str,
    parameters: Mapping[str, int],
    trained: Mapping[str, int],
    total_steps: int,
    loader: TrainLoader,
    validation: ValidationLoader | None,
) -> list[str]:
    """One headline and indented rows below it.

    Args:
        config: the run.
        context: the layout as it is.
        layers: which layers compute, in words.
        parameters: group -> parameters of the whole model.
        trained: group -> those of them that train.
        total_steps: optimizer steps of the stage.
        loader, validation: for the samples.
    """
    training, total = config.training, sum(parameters.values())
    rows: list[tuple[str, str]] = [
        ("layout", _layout(config, context)),
        ("precision", training.precision),
        ("layers", layers),
        ("trained", _parameters(trained, total)),
        ("frozen", _parameters({group: count - trained[group] for group, count in parameters.items()}, total)),
        ("data", f"{_samples(loader.num_samples)} in {', '.join(config.data.train)}; {_packing(config)}"),
        ("validation", _validation(config, validation)),
        ("batch", _batch(config, context.dp_size)),
        ("length", length_in_epochs(config, total_steps, loader.epoch_size)),
        *_places(config),
    ]
    if config.checkpoint.init_from:
        rows.insert(1, ("starts from", ", ".join(config.checkpoint.init_from)))
    elif not training.stage.startswith("stage1"):
        rows.insert(1, ("starts from", _NOTHING_EARLIER))
    return [f"{config.name}: training {training.stage}", *(f"  {name:<12}{text}" for name, text in rows)]


_NOTHING_EARLIER = "nothing trained earlier: adapters and plugins are new (checkpoint.init_from names earlier stages)"


def _layout(config: RunConfig, context: DistributedContext) -> str:
    parallel = config.parallel
    tensor = f"tensor {context.tp_size}" + (" with sequence parallelism" if parallel.sequence_parallel else "")
    chunks = parallel.virtual_pipeline_model_parallel_size
    pipeline = f"pipeline {context.pp_size}" + (f" of {chunks} chunks each" if chunks else "")
    engine = "" if config.engine.name == "megatron" else f"; {config.engine.name}, ZeRO-{config.engine.zero_stage}"
    return (
        f"{plural(context.world_size, 'process')} on {context.device.type}: {tensor} x {pipeline} x context "
        f"{context.cp_size} x data {context.dp_size}{engine}"
    )


def _parameters(counts: Mapping[str, int], total: int) -> str:
    every = sum(counts.values())
    parts = [f"{group} {count:,}" for group, count in counts.items() if count]
    return f"{every:,} ({every / max(total, 1):.2%}): {', '.join(parts) or 'none'}"


def _packing(config: RunConfig) -> str:
    if config.data.packing == "none":
        return "not packed"
    return f"packed {config.data.packing} into rows of {config.data.pack_length or config.model.max_seq_length} tokens"


def _validation(config: RunConfig, validation: ValidationLoader | None) -> str:
    if validation is None:
        return "none (data.validation is empty)"
    interval = config.training.validation_interval_steps
    when = f"every {plural(interval, 'step')} and after the last" if interval else "after the last step"
    return f"{_samples(validation.num_samples)} in {', '.join(config.data.validation)}, {when}"


def _samples(counts: Mapping[Task, int]) -> str:
    return " and ".join(f"{count:,} {task.value}" for task, count in counts.items()) + " samples"


def _batch(config: RunConfig, dp_size: int) -> str:
    unit = "samples" if config.data.packing == "none" else "packed rows"
    micro, accumulated = config.training.micro_batch_size, num_micro_batches(config, dp_size)
    total = global_batch_size(config)
    return f"{total:,} {unit} per step = micro-batch of {micro} x {accumulated} accumulated x {dp_size} data-parallel"


def _places(config: RunConfig) -> list[tuple[str, str]]:
    output, checkpoint = Path(config.output_dir), config.checkpoint
    keep = f"newest {checkpoint.keep_last} kept" if checkpoint.keep_last else "all kept"
    directory = checkpoint.directory or output / "checkpoints"
    files = ["metrics.jsonl", "summary.json", "resolved_config.yaml"]
    if config.data.validation:
        files.insert(1, "validation.jsonl")
    places = [
        ("checkpoints", f"{directory}, every {plural(checkpoint.save_interval_steps, 'step')}, {keep}"),
        ("metrics", f"{output}: {', '.join(files)}"),
    ]
    if config.logging.tensorboard:
        places.append(("TensorBoard", f"tensorboard --logdir {output / 'tensorboard'}"))
    return places
