"""The text of a dry run: what a configuration resolves to, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_hgpt.batching import (
    data_parallel_size,
    global_batch_size,
    length_in_epochs,
    num_micro_batches,
    repetition_warning,
    steps_per_epoch,
)
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import dump
from megatron_hgpt.model.parameter_counts import count_parameters
from megatron_hgpt.model_folders import PUBLISHED, absent_folders, published_variant
from megatron_hgpt.rounding import plural
from megatron_hgpt.stages import Stage, resolve_stage
from megatron_hgpt.text.vocabulary import Vocabulary


def describe(config: RunConfig, world_size: int) -> str:
    """What ``--dry-run`` prints of a validated run: resolved configuration, parameters per group, batch arithmetic.

    Starts nothing.
    """
    stage = resolve_stage(config.training)
    samples, unreadable = _known_samples(config, stage)
    dp_size, total = data_parallel_size(config, world_size), global_batch_size(config)
    micro = config.training.micro_batch_size
    lines = ["# resolved configuration", dump(config).rstrip(), "", "# parameters", ""]
    counts = count_parameters(config.model)
    vocabulary = Vocabulary.from_config(config.model)
    trained_total = 0
    for group, count in counts.items():
        is_vocabulary = group in ("embeddings", "head")
        trained = count if group in stage.trainable or (is_vocabulary and "vocabulary" in stage.trainable) else 0
        note = "trainable" if trained else "frozen"
        if is_vocabulary and "new_rows" in stage.trainable:
            trained = (vocabulary.size - vocabulary.text_size) * (count // vocabulary.padded_size)
            note = f"trainable: {trained:,} in the VQ rows"
        trained_total += trained
        lines.append(f"{group:<22}{count:>18,}  {note}")
    every = sum(counts.values())
    lines += [
        f"{'all':<22}{every:>18,}  {trained_total:,} trainable ({trained_total / max(every, 1):.2%})",
        "",
        "# batch arithmetic",
        "",
        f"processes                       {world_size}",
        f"tensor parallel size            {config.parallel.tensor_model_parallel_size}"
        f"{' with sequence parallelism' if config.parallel.sequence_parallel else ''}",
        f"pipeline parallel size          {_pipeline(config)}",
        f"context parallel size           {config.parallel.context_parallel_size}",
        f"data parallel size              {dp_size}",
        f"samples per optimizer step      {total}",
        f"micro-batches per rank          {num_micro_batches(config, dp_size)} of {micro} samples",
        f"tokens per optimizer step       at most {total * config.model.max_seq_length:,}",
        f"length of the run               {_length(config, samples)}{unreadable}",
        "learning rates                  "
        + ", ".join(
            f"{group} {stage.lr_of(group, config.optimizer.lr, config.optimizer.adapter_lr):g}"
            for group in stage.trainable
        ),
    ]
    if (variant := published_variant(config.model)) is not None:
        lines.append(f"shape of the backbone           {PUBLISHED[variant]}'s, whose published values are the defaults")
    if samples and (warning := repetition_warning(config, sum(samples))):
        lines += ["", f"warning: {warning}"]
    if absent := absent_folders(config.model):
        lines += ["", "# not on this machine, taken as the configuration describes them", "", *absent]
    return "\n".join(lines)


def _pipeline(config: RunConfig) -> str:
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    return f"{config.parallel.pipeline_model_parallel_size}" + (f", {chunks} chunks each" if chunks else "")


def _length(config: RunConfig, samples: list[int]) -> str:
    """Steps, samples drawn and epochs where the manifests say how many samples there are; else what is configured."""
    training = config.training
    epochs = 1.0 if training.num_epochs is None else training.num_epochs
    configured = f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'}"
    if training.num_steps is not None:
        configured = plural(training.num_steps, "step")
    if not samples:
        return configured
    steps = training.num_steps
    if steps is None:
        micro, total = training.micro_batch_size, global_batch_size(config)
        epoch = steps_per_epoch(samples, micro_batch_size=micro, global_batch_size=total)
        steps = max(1, round(epochs * epoch))
    return length_in_epochs(config, steps, sum(samples))


def _known_samples(config: RunConfig, stage: Stage) -> tuple[list[int], str]:
    """Samples of each task of the stage, and what is wrong with the manifests, in brackets.

    There are none where the manifests do not say it, where packed rows are drawn instead, and with a mixture.
    """
    manifests = [Path(folder) / "manifest.json" for folder in config.data.train]
    if config.data.mixture or config.data.packing != "none" or not all(path.is_file() for path in manifests):
        return [], ""
    try:
        per_task = [json.loads(path.read_text(encoding="utf-8"))["counts"]["per_task"] for path in manifests]
        samples = [sum(int(counts.get(task.value, 0)) for counts in per_task) for task in stage.tasks]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [], f" (unreadable manifest in data.train: {error!r})"
    return samples if any(samples) else [], ""
