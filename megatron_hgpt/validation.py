"""Checks of a whole configuration before any process group exists, and the text of a dry run.

Every message names the field, its value, and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_hgpt.config import HLoRAPluginConfig, RunConfig
from megatron_hgpt.config_io import dump
from megatron_hgpt.data.samples import TASKS
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.model.backbone import check_tensor_parallel, read_backbone
from megatron_hgpt.model.parameter_counts import count_parameters
from megatron_hgpt.model.vocabulary import Vocabulary
from megatron_hgpt.stages import resolve_stage


def validate(config: RunConfig, world_size: int, *, check_paths: bool = True) -> None:
    """Raise ConfigError at the first problem.

    Args:
        config: the run.
        world_size: processes that will run it.
        check_paths: whether folders must exist (a shipped configuration names a user's folders).
    """
    for problem in _problems(config, world_size):
        raise ConfigError(problem)
    if check_paths:
        for problem in _missing_paths(config):
            raise ConfigError(problem)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Replicas of the model.

    Raises:
        ConfigError: the layout does not divide the number of processes.
    """
    parallel = config.parallel
    one = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    if one < 1 or world_size % one:
        raise ConfigError(
            f"{world_size} processes cannot hold replicas of {one} (tensor {parallel.tensor_model_parallel_size} x "
            f"pipeline {parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size}); start a "
            f"multiple of {one}, e.g. torchrun --nproc-per-node {one}"
        )
    return world_size // one


def global_batch_size(config: RunConfig) -> int:
    """Samples per optimizer step: the configured number, or the stage's."""
    return config.training.global_batch_size or resolve_stage(config.training).global_batch_size


def _one_of(field: str, value: object, allowed: tuple[object, ...]) -> Iterator[str]:
    if value not in allowed:
        yield f"{field}={value!r} is unknown; use one of {', '.join(str(item) for item in allowed)}"


def _problems(config: RunConfig, world_size: int) -> Iterator[str]:
    training, parallel, model = config.training, config.parallel, config.model
    yield from _one_of("training.precision", training.precision, ("bf16", "fp32"))
    yield from _one_of("training.recompute", training.recompute, (None, "selective", "full"))
    yield from _one_of("optimizer.schedule", config.optimizer.schedule, (None, "cosine", "linear", "constant"))
    from megatron_hgpt.data.templates import TEMPLATES

    yield from _one_of("model.template", model.template, tuple(TEMPLATES))
    stage = resolve_stage(training)
    shape = read_backbone(model.hf_config)
    if model.max_seq_length > shape.max_positions:
        yield (
            f"model.max_seq_length={model.max_seq_length} exceeds the backbone's max_position_embeddings="
            f"{shape.max_positions}; lower it"
        )
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(parallel, name) != 1:
            yield f"parallel.{name}={getattr(parallel, name)} is not supported by this version; use 1"
    if parallel.use_distributed_optimizer:
        yield "parallel.use_distributed_optimizer=true is not supported by this version; use false"
    check_tensor_parallel(shape, parallel.tensor_model_parallel_size)
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1; set it to false"
    dp_size = data_parallel_size(config, world_size)
    yield from _batch_problems(config, dp_size)
    if (training.num_steps is None) == (training.num_epochs is None):
        yield (
            f"set exactly one of training.num_steps ({training.num_steps}) and training.num_epochs "
            f"({training.num_epochs})"
        )
    for name in ("num_steps", "num_epochs"):
        value = getattr(training, name)
        if value is not None and value <= 0:
            yield f"training.{name}={value} must be positive"
    for task in TASKS:
        plugin: HLoRAPluginConfig | None = getattr(model.hlora, task.value)
        if plugin is None and task in stage.tasks:
            yield f"training.stage={training.stage} trains {task.value}, but model.hlora.{task.value} is null"
        if plugin is not None:
            yield from _plugin_problems(f"model.hlora.{task.value}", plugin)
    vocabulary = Vocabulary.from_config(model)
    if vocabulary.padded_size % parallel.tensor_model_parallel_size:
        yield (
            f"{vocabulary.padded_size} padded vocabulary rows cannot be sharded over tensor_model_parallel_size="
            f"{parallel.tensor_model_parallel_size}; make model.vocabulary.pad_to_multiple a multiple of it"
        )
    if "new_rows" in stage.trainable and config.optimizer.weight_decay:
        yield "optimizer.weight_decay must be 0 while training.new_rows=rows: it would shrink the frozen rows"
    for name, weight in config.data.mixture.items():
        yield from _one_of("data.mixture", name, tuple(task.value for task in TASKS))
        if weight < 0:
            yield f"data.mixture.{name}={weight} must not be negative"


def _plugin_problems(name: str, plugin: HLoRAPluginConfig) -> Iterator[str]:
    if plugin.num_experts < 1 or plugin.lora_rank < 1 or plugin.lora_rank % plugin.num_experts:
        yield (
            f"{name}.lora_rank={plugin.lora_rank} must be a positive multiple of num_experts={plugin.num_experts}: "
            "it is the total over all experts"
        )
    if not 0.0 <= plugin.dropout < 1.0:
        yield f"{name}.dropout={plugin.dropout} must be at least 0 and below 1"


def _batch_problems(config: RunConfig, dp_size: int) -> Iterator[str]:
    micro, total = config.training.micro_batch_size, global_batch_size(config)
    if micro < 1 or total < 1 or total % (micro * dp_size):
        yield (
            f"training.global_batch_size={total} must be a positive multiple of micro_batch_size ({micro}) x data "
            f"parallel size ({dp_size}) = {micro * dp_size}"
        )


def _missing_paths(config: RunConfig) -> Iterator[str]:
    model, data = config.model, config.data
    folders = {"model.backbone": model.backbone, "model.tokenizer": model.tokenizer, "model.vision.tower": model.vision.tower}
    folders["model.vq.path"] = model.vq.path
    for name, value in folders.items():
        if value is not None and not Path(value).is_dir():
            yield f"{name}={value} is not a folder"
    if model.tokenizer is None and model.backbone is None:
        yield "set model.tokenizer (or model.backbone, whose tokenizer is then used)"
    if not data.train:
        yield "data.train is empty: name at least one folder written by tools/preprocess_vl_health.py"
    for name in ("train", "validation"):
        for value in getattr(data, name):
            if not (Path(value) / "manifest.json").is_file():
                yield f"data.{name}: {value} holds no manifest.json; write it with tools/preprocess_vl_health.py"
    for value in config.checkpoint.init_from:
        if not Path(value).exists():
            yield f"checkpoint.init_from: {value} does not exist; train the earlier stage first"
    parent = Path(config.output_dir).absolute()
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        yield f"output_dir={config.output_dir} cannot be written"


def describe(config: RunConfig, world_size: int) -> str:
    """What ``--dry-run`` prints: resolved configuration, parameters per group, batch arithmetic. Starts nothing."""
    stage = resolve_stage(config.training)
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
        f"data parallel size              {dp_size}",
        f"samples per optimizer step      {total}",
        f"micro-batches per rank          {total // (micro * dp_size)} of {micro} samples",
        f"tokens per optimizer step       at most {total * config.model.max_seq_length:,}",
        f"length of the run               "
        + (f"{config.training.num_steps} steps" if config.training.num_steps else f"{config.training.num_epochs} epochs"),
        f"learning rates                  "
        + ", ".join(
            f"{group} {stage.lr_of(group, config.optimizer.lr, config.optimizer.adapter_lr):g}"
            for group in stage.trainable
        ),
    ]
    return "\n".join(lines)
