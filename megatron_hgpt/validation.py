"""Checks of a whole configuration before any process group exists.

Every message names the field, its value, and what to do.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_hgpt import cpu_platform
from megatron_hgpt.backbone.implementation import IMPLEMENTATIONS, PRECISIONS, fp8_problems, resolve_transformer_impl
from megatron_hgpt.backbone.shape import BackboneShape, check_tensor_parallel, read_backbone
from megatron_hgpt.backbone.transformer import check_override_names, transformer_config
from megatron_hgpt.batching import data_parallel_size, global_batch_size
from megatron_hgpt.config import HLoRAPluginConfig, RunConfig
from megatron_hgpt.engines.deepspeed_settings import engine_problems, missing_requirements
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.samples import TASKS, Task
from megatron_hgpt.stages import Stage, resolve_stage
from megatron_hgpt.text.vocabulary import Vocabulary

_AT_LEAST = {
    "checkpoint.keep_last": 0,
    "checkpoint.save_interval_steps": 1,
    "data.num_workers": 0,
    "logging.interval_steps": 1,
    "logging.num_sample_images": 1,
    "logging.sample_images_interval_steps": 0,
    "model.max_seq_length": 1,
    "model.vocabulary.pad_to_multiple": 1,
    "model.vocabulary.text_size": 1,
    "model.vq.num_codes": 0,
    "model.vq.num_indices": 0,
    "optimizer.adam_eps": 0,
    "optimizer.adapter_lr": 0,
    "optimizer.clip_grad": 0,
    "optimizer.lr": 0,
    "optimizer.weight_decay": 0,
    "parallel.context_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.tensor_model_parallel_size": 1,
    "training.seed": 0,
}
_SHARES = ("optimizer.min_lr_ratio", "optimizer.warmup_ratio")
_DECAYS = ("optimizer.adam_beta1", "optimizer.adam_beta2")


def validate(config: RunConfig, world_size: int, *, check_paths: bool = True) -> None:
    """Raise ConfigError at the first problem.

    Args:
        config: the run.
        world_size: processes that will run it.
        check_paths: whether folders and optional packages must be here (a shipped configuration names a user's).
    """
    for problem in _problems(config, world_size):
        raise ConfigError(problem)
    if check_paths:
        resolve_transformer_impl(config.model, config.training)
        for problem in (*missing_requirements(config), *_missing_paths(config)):
            raise ConfigError(problem)


def _one_of(field: str, value: object, allowed: tuple[object, ...]) -> Iterator[str]:
    if value not in allowed:
        yield f"{field}={value!r} is unknown; use one of {', '.join(str(item) for item in allowed)}"


def _problems(config: RunConfig, world_size: int) -> Iterator[str]:
    training, parallel, model = config.training, config.parallel, config.model
    yield from _range_problems(config)
    yield from _one_of("training.precision", training.precision, PRECISIONS)
    yield from _one_of("model.transformer_impl", model.transformer_impl, IMPLEMENTATIONS)
    yield from _one_of("training.recompute", training.recompute, (None, "selective", "full"))
    yield from _one_of("optimizer.schedule", config.optimizer.schedule, (None, "cosine", "linear", "constant"))
    from megatron_hgpt.text.templates import TEMPLATES

    yield from _one_of("model.template", model.template, tuple(TEMPLATES))
    stage = resolve_stage(training)
    shape = read_backbone(model.hf_config)
    yield from engine_problems(config)
    if model.max_seq_length > shape.max_positions:
        yield (
            f"model.max_seq_length={model.max_seq_length} exceeds the backbone's max_position_embeddings="
            f"{shape.max_positions}; lower it"
        )
    yield from _pipeline_problems(config, shape.num_layers)
    check_tensor_parallel(shape, parallel.tensor_model_parallel_size)
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1; set it to false"
    dp_size = data_parallel_size(config, world_size)
    if training.precision == "fp8":
        yield from fp8_problems(shape, model, parallel)
    yield from _batch_problems(config, dp_size)
    yield from _interleaving_problems(config, dp_size)
    if (training.num_steps is None) == (training.num_epochs is None):
        yield (
            f"set exactly one of training.num_steps ({training.num_steps}) and training.num_epochs "
            f"({training.num_epochs})"
        )
    for name in ("num_steps", "num_epochs"):
        value = getattr(training, name)
        if value is not None and not (math.isfinite(value) and value > 0):
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
    yield from _vision_problems(config, stage)
    cache = config.data.feature_cache
    if cache is not None and (not cache or cache.startswith(".") or Path(cache).name != cache):
        yield f"data.feature_cache={cache!r} must be the plain name of a sub-folder of each dataset folder"
    for name, weight in config.data.mixture.items():
        yield from _one_of("data.mixture", name, tuple(task.value for task in TASKS))
        if not (math.isfinite(weight) and weight >= 0):
            yield f"data.mixture.{name}={weight} must be a number of at least 0"
    if config.data.mixture and not any(config.data.mixture.get(task.value) for task in stage.tasks):
        yield f"data.mixture={config.data.mixture} leaves training.stage={training.stage} without samples"
    missing = [task.value for task in stage.tasks if config.data.mixture and task.value not in config.data.mixture]
    if missing:
        yield f"data.mixture has no weight for {missing[0]}, which {training.stage} trains; 0 leaves it out"
    yield from _packing_problems(config)
    _check_megatron_overrides(config, shape)


def _packing_problems(config: RunConfig) -> Iterator[str]:
    data, longest = config.data, config.model.max_seq_length
    yield from _one_of("data.packing", data.packing, ("none", "by_task", "mixed"))
    if data.packing == "none":
        if data.pack_length is not None:
            yield f"data.pack_length={data.pack_length} has no effect without packing; set data.packing or remove it"
        return
    if config.training.micro_batch_size != 1:
        yield (
            f"training.micro_batch_size={config.training.micro_batch_size} must be 1 with data.packing={data.packing}: "
            "a packed row is a micro-batch; raise data.pack_length to make it larger"
        )
    if data.pack_length is not None and data.pack_length < longest:
        yield f"data.pack_length={data.pack_length} is below model.max_seq_length={longest}; raise it"
    if config.parallel.context_parallel_size > 1:
        yield (
            f"data.packing={data.packing} cannot be shared by parallel.context_parallel_size="
            f"{config.parallel.context_parallel_size} ranks; use one of the two"
        )
    if data.packing == "mixed" and data.mixture:
        yield "data.mixture weighs micro-batches of one task; with data.packing=mixed remove it, or pack by_task"


def _pipeline_problems(config: RunConfig, num_layers: int) -> Iterator[str]:
    parallel = config.parallel
    size, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    ends = {
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
    }
    given = {name: value for name, value in ends.items() if value is not None}
    if size == 1:
        for name, value in {"virtual_pipeline_model_parallel_size": chunks, **given}.items():
            if value is not None:
                yield f"parallel.{name}={value} needs parallel.pipeline_model_parallel_size > 1; remove it"
        return
    left, stages = num_layers - sum(given.values()), size - len(given)
    if any(value < 1 for value in given.values()) or left < stages or (left % stages if stages else left):
        split = ", ".join(f"{name}={value}" for name, value in given.items())
        yield (
            f"parallel.pipeline_model_parallel_size={size}: {left} of the {num_layers} layers cannot be split evenly "
            f"over {stages} stages{f' ({split})' if split else ''}; choose another size, or set "
            "num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage"
        )
    per_stage = {*given.values(), *([left // stages] if stages else [])}
    if chunks is not None and (chunks < 2 or any(count % chunks for count in per_stage)):
        yield (
            f"parallel.virtual_pipeline_model_parallel_size={chunks} must be at least 2 and divide the layers of "
            f"each stage ({', '.join(map(str, sorted(per_stage)))})"
        )


def _range_problems(config: RunConfig) -> Iterator[str]:
    for name, minimum in _AT_LEAST.items():
        value = operator.attrgetter(name)(config)
        if value is not None and not (math.isfinite(value) and value >= minimum):
            yield f"{name}={value} must be a number of at least {minimum}"
    for name in _SHARES:
        value = operator.attrgetter(name)(config)
        if value is not None and not 0 <= value <= 1:
            yield f"{name}={value} must be a share between 0 and 1"
    for name in _DECAYS:
        value = operator.attrgetter(name)(config)
        if not 0 <= value < 1:
            yield f"{name}={value} must be at least 0 and below 1"


def _vision_problems(config: RunConfig, stage: Stage) -> Iterator[str]:
    vision, sizes = config.model.vision, config.model.vision.hf_config
    if not sizes:
        yield "model.vision.hf_config is empty: copy the tower's config.json (vision_config) or name a preset"
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size"):
        value = sizes.get(key)
        if type(value) is not int or value < 1:
            yield f"model.vision.hf_config.{key}={value!r} must be a positive integer"
    if sizes["patch_size"] > sizes["image_size"]:
        yield (
            f"model.vision.hf_config.patch_size={sizes['patch_size']} exceeds image_size={sizes['image_size']}: "
            "a picture would give no token"
        )
    for task in stage.tasks:
        depth, blocks = getattr(vision, f"{task.value}_hidden_state"), sizes["num_hidden_layers"]
        if not -(blocks + 1) <= depth <= blocks:
            yield (
                f"model.vision.{task.value}_hidden_state={depth} is outside a tower of {blocks} blocks; "
                f"use {-(blocks + 1)} to {blocks}"
            )
    if Task.GENERATION in stage.tasks and not (config.model.vq.num_codes and config.model.vq.num_indices):
        yield (
            f"training.stage={config.training.stage} draws images, but model.vq.num_codes={config.model.vq.num_codes} "
            f"and num_indices={config.model.vq.num_indices}; set them to the VQGAN's"
        )


def _check_megatron_overrides(config: RunConfig, shape: BackboneShape) -> None:
    """Raise ConfigError for names that Megatron's dataclasses lack; Megatron is imported only if there are any."""
    if config.model.transformer_overrides:
        transformer_config(shape, config.model, config.parallel, config.training)
    if config.optimizer.megatron_overrides:
        cpu_platform.install_if_needed()
        from megatron.core.optimizer import OptimizerConfig

        from megatron_hgpt.optim import megatron_optimizer_settings

        check_override_names("optimizer.megatron_overrides", config.optimizer.megatron_overrides, OptimizerConfig)
        decided = megatron_optimizer_settings(config, resolve_stage(config.training))
        if clash := sorted(decided.keys() & config.optimizer.megatron_overrides.keys()):
            raise ConfigError(
                f"optimizer.megatron_overrides.{clash[0]} is decided by optimizer, parallel or training; set it there"
            )


def _plugin_problems(name: str, plugin: HLoRAPluginConfig) -> Iterator[str]:
    if plugin.num_experts < 1 or plugin.lora_rank < 1 or plugin.lora_rank % plugin.num_experts:
        yield (
            f"{name}.lora_rank={plugin.lora_rank} must be a positive multiple of num_experts={plugin.num_experts}: "
            "it is the total over all experts"
        )
    if not (math.isfinite(plugin.alpha) and plugin.alpha > 0):
        yield f"{name}.alpha={plugin.alpha} must be a positive number: the plugin's output is scaled by it"
    if not 0.0 <= plugin.dropout < 1.0:
        yield f"{name}.dropout={plugin.dropout} must be at least 0 and below 1"


def _batch_problems(config: RunConfig, dp_size: int) -> Iterator[str]:
    micro, total = config.training.micro_batch_size, global_batch_size(config)
    if micro < 1 or total < 1 or total % (micro * dp_size):
        yield (
            f"training.global_batch_size={total} must be a positive multiple of micro_batch_size ({micro}) x data "
            f"parallel size ({dp_size}) = {micro * dp_size}"
        )


def _interleaving_problems(config: RunConfig, dp_size: int) -> Iterator[str]:
    parallel, micro = config.parallel, config.training.micro_batch_size
    size = parallel.pipeline_model_parallel_size
    count = global_batch_size(config) // max(micro * dp_size, 1)
    if parallel.virtual_pipeline_model_parallel_size is not None and (count < size or 0 < count % size < size):
        yield (
            f"{count} micro-batches per rank: the interleaved schedule needs a multiple of "
            f"parallel.pipeline_model_parallel_size={size}; change training.global_batch_size or micro_batch_size"
        )


def _missing_paths(config: RunConfig) -> Iterator[str]:
    model, data = config.model, config.data
    folders = {
        "model.backbone": model.backbone,
        "model.tokenizer": model.tokenizer,
        "model.vision.tower": model.vision.tower,
    }
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
            elif data.feature_cache and not (Path(value) / data.feature_cache / "manifest.json").is_file():
                yield f"data.feature_cache: {value} has no {data.feature_cache}; write it with tools/cache_features.py"
    for value in config.checkpoint.init_from:
        if not Path(value).exists():
            yield f"checkpoint.init_from: {value} does not exist; train the earlier stage first"
    parent = Path(config.output_dir).absolute()
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        yield f"output_dir={config.output_dir} cannot be written"
