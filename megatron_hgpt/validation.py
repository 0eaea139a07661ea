"""Checks of a whole configuration before any process group exists: rules across fields, and the folders it names.

Choices and ranges of one field are part of its type and checked by `config_io`. Every message names the field, its
value, and what to do; all of them come at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_hgpt import cpu_platform
from megatron_hgpt.backbone.implementation import fp8_problems, resolve_transformer_impl
from megatron_hgpt.backbone.shape import (
    BackboneShape,
    check_tensor_parallel,
    legal_tensor_parallel_sizes,
    read_backbone,
)
from megatron_hgpt.backbone.transformer import check_override_names, transformer_config
from megatron_hgpt.batching import data_parallel_size, global_batch_size
from megatron_hgpt.config import PLUGIN_SIZES, HLoRAPluginConfig, RunConfig, TimeoutsConfig
from megatron_hgpt.config_io import Problem, check_types
from megatron_hgpt.data.dataset import manifest_problems
from megatron_hgpt.engines.deepspeed_settings import engine_problems, missing_requirements
from megatron_hgpt.errors import ConfigError, DataError, raise_problems
from megatron_hgpt.files import read_json, why_not_writable
from megatron_hgpt.model_folders import absent_folders, resolve_model, with_read_problems
from megatron_hgpt.samples import TASKS, Task
from megatron_hgpt.stages import Stage, resolve_stage
from megatron_hgpt.text.templates import template_of
from megatron_hgpt.text.vocabulary import Vocabulary
from megatron_hgpt.vision.tower_sizes import tower_problems

_T = TypeVar("_T")


def validate(config: RunConfig, world_size: int, *, check_paths: bool = True, read: Sequence[Problem] = ()) -> None:
    """Fill the configuration from the model's folders (`model_folders.resolve_model`) and check all of it.

    Args:
        config: the run.
        world_size: processes that will run it.
        check_paths: whether folders and optional packages must be here (a shipped configuration names a user's). What
            is here of the model's folders is read in any case.
        read: what could not be read of it (`config_io.read_config`), to be said in the same message.

    Raises:
        ConfigError: one for all problems.
    """
    raise_problems(find_problems(config, world_size, check_paths=check_paths, read=read))


def find_problems(
    config: RunConfig, world_size: int, *, check_paths: bool = True, read: Sequence[Problem] = ()
) -> list[str]:
    """As `validate`, returning the problems."""
    checked, wrong = check_types(config)
    if wrong:
        config = checked  # the rules across fields then see defaults in place of what is no value at all
    problems = [*resolve_model(config), *_problems(config, world_size)]
    problems += _dataset_problems(config)
    if check_paths:
        problems += [*missing_packages(config), *_missing_paths(config)]
    return list(dict.fromkeys(with_read_problems(problems, [*read, *wrong])))


def missing_packages(config: RunConfig) -> list[str]:
    """What this machine lacks for layers, engine and trackers, as messages."""
    problems: list[str] = []
    _attempt(problems, resolve_transformer_impl, config.model, config.training)
    requirements: list[str] = _attempt(problems, list, missing_requirements(config)) or []
    return [*problems, *requirements, *_missing_trackers(config)]


def _attempt(problems: list[str], function: Callable[..., _T], *arguments: Any) -> _T | None:
    """What a function returns; None, and its message among the problems, where it raises ConfigError."""
    try:
        return function(*arguments)
    except ConfigError as error:
        problems.append(str(error))
        return None


def _problems(config: RunConfig, world_size: int) -> list[str]:
    """Rules across fields, each as far as earlier problems leave something to check."""
    stage = resolve_stage(config.training)
    found = [*engine_problems(config), *_run_problems(config, stage), *_timeout_problems(config.timeouts)]
    found += _unnamed_folders(config)
    shape = _attempt(found, read_backbone, config.model.hf_config) if config.model.hf_config else None
    if shape is not None:
        found += _shape_problems(config, shape)
        _attempt(found, _check_megatron_overrides, config, shape)
    dp_size = _attempt(found, data_parallel_size, config, world_size)
    if dp_size is not None:
        found += [*_batch_problems(config, dp_size), *_interleaving_problems(config, dp_size)]
    if config.model.vocabulary.text_size is not None and config.model.vq.num_codes is not None:
        found += _vocabulary_problems(config)
    if config.model.vision.hf_config:
        found += tower_problems(config, stage)
    return [*found, *_plugin_problems(config, stage), *_data_problems(config, stage), *_packing_problems(config)]


def _unnamed_folders(config: RunConfig) -> Iterator[str]:
    """Sizes that nothing says; a folder that is named and says nothing is a problem of its own already."""
    model = config.model
    if model.backbone is None and not model.hf_config:
        yield "model.backbone is not set: name the folder of a Hugging Face causal LM, or a preset for its sizes"
    if model.vision.tower is None and not model.vision.hf_config:
        yield "model.vision.tower is not set: name the folder of a CLIP vision model, or a preset for its sizes"
    if model.tokenizer is None and model.backbone is None and model.vocabulary.text_size is None:
        yield _NO_TOKENIZER


_NO_TOKENIZER = "set model.tokenizer (or model.backbone, whose tokenizer is then used)"


def _run_problems(config: RunConfig, stage: Stage) -> Iterator[str]:
    training, parallel, vq = config.training, config.parallel, config.model.vq
    if training.num_steps is not None and training.num_epochs is not None:
        yield f"set one of training.num_steps={training.num_steps} and training.num_epochs={training.num_epochs:g} only"
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1; set it to false"
    if not config.output_dir.strip():
        yield f"output_dir={config.output_dir!r} names no folder; set it to where the run may write"
    if "new_rows" in stage.trainable and config.optimizer.weight_decay:
        yield "optimizer.weight_decay must be 0 while training.new_rows=rows: it would shrink the frozen rows"
    if Task.GENERATION in stage.tasks and 0 in (vq.num_codes, vq.num_indices):
        yield (
            f"training.stage={training.stage} draws images, but model.vq.num_codes={vq.num_codes} and num_indices="
            f"{vq.num_indices}; set model.vq.path, or set them to the VQGAN's"
        )


def _timeout_problems(timeouts: TimeoutsConfig) -> Iterator[str]:
    warning_s, limit_s, collective_s = timeouts.step_warning_s, timeouts.step_limit_s, timeouts.collective_s
    if warning_s >= limit_s:
        yield (
            f"timeouts.step_warning_s={warning_s:g} must be below timeouts.step_limit_s={limit_s:g}, which ends the "
            "run; lower the one or raise the other"
        )
    if collective_s < limit_s:
        yield (
            f"timeouts.collective_s={collective_s:g} is below timeouts.step_limit_s={limit_s:g}: torch would end the "
            "run before the watchdog says why; raise it"
        )


def _shape_problems(config: RunConfig, shape: BackboneShape) -> Iterator[str]:
    model, size = config.model, config.parallel.tensor_model_parallel_size
    if model.max_seq_length > shape.max_positions:
        yield (
            f"model.max_seq_length={model.max_seq_length} exceeds the backbone's max_position_embeddings="
            f"{shape.max_positions}; lower it"
        )
    yield from _pipeline_problems(config, shape.num_layers)
    if size not in legal_tensor_parallel_sizes(shape):
        tensor: list[str] = []
        _attempt(tensor, check_tensor_parallel, shape, size)
        yield from tensor
    elif config.training.precision == "fp8":
        yield from fp8_problems(shape, model, config.parallel)


def _vocabulary_problems(config: RunConfig) -> Iterator[str]:
    vocabulary, size = Vocabulary.from_config(config.model), config.parallel.tensor_model_parallel_size
    if vocabulary.padded_size % size:
        yield (
            f"{vocabulary.padded_size} padded vocabulary rows cannot be sharded over tensor_model_parallel_size="
            f"{size}; make model.vocabulary.pad_to_multiple a multiple of it"
        )


def _data_problems(config: RunConfig, stage: Stage) -> Iterator[str]:
    cache, mixture = config.data.feature_cache, config.data.mixture
    if cache is not None and (not cache or cache.startswith(".") or Path(cache).name != cache):
        yield f"data.feature_cache={cache!r} must be the plain name of a sub-folder of each dataset folder"
    interval = config.training.validation_interval_steps
    if interval and not config.data.validation:
        yield f"training.validation_interval_steps={interval} needs data.validation; name folders, or set it to 0"
    names = [task.value for task in TASKS]
    unknown = [name for name in mixture if name not in names]
    for name in unknown:
        yield f"data.mixture.{name} is unknown; use {' and '.join(names)}"
    if unknown or not mixture:
        return
    if not any(mixture.get(task.value) for task in stage.tasks):
        yield f"data.mixture={mixture} leaves training.stage={config.training.stage} without samples"
    missing = [task.value for task in stage.tasks if task.value not in mixture]
    if missing:
        yield f"data.mixture has no weight for {missing[0]}, which {config.training.stage} trains; 0 leaves it out"


def _packing_problems(config: RunConfig) -> Iterator[str]:
    data, longest = config.data, config.model.max_seq_length
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
    if left < stages or (left % stages if stages else left):
        split = ", ".join(f"{name}={value}" for name, value in given.items())
        yield (
            f"parallel.pipeline_model_parallel_size={size}: {left} of the {num_layers} layers cannot be split evenly "
            f"over {stages} stages{f' ({split})' if split else ''}; choose another size, or set "
            "num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage"
        )
    per_stage = {*given.values(), *([left // stages] if stages else [])}
    if chunks is not None and any(count % chunks for count in per_stage):
        yield (
            f"parallel.virtual_pipeline_model_parallel_size={chunks} must divide the layers of each stage "
            f"({', '.join(map(str, sorted(per_stage)))})"
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


def _plugin_problems(config: RunConfig, stage: Stage) -> Iterator[str]:
    for task in TASKS:
        name = f"model.hlora.{task.value}"
        plugin: HLoRAPluginConfig | None = config.model.hlora.of(task)
        if plugin is None and task in stage.tasks:
            yield (
                f"training.stage={config.training.stage} trains {task.value}, but {name} is null; give it "
                f"{', '.join(PLUGIN_SIZES[:-1])} and {PLUGIN_SIZES[-1]}"
            )
        if plugin is not None and plugin.lora_rank % plugin.num_experts:
            yield (
                f"{name}.lora_rank={plugin.lora_rank} must be a multiple of num_experts={plugin.num_experts}: it is "
                "the total over all experts"
            )


def _batch_problems(config: RunConfig, dp_size: int) -> Iterator[str]:
    micro, total = config.training.micro_batch_size, global_batch_size(config)
    if total % (micro * dp_size):
        yield (
            f"training.global_batch_size={total} must be a multiple of micro_batch_size ({micro}) x data "
            f"parallel size ({dp_size}) = {micro * dp_size}"
        )


def _interleaving_problems(config: RunConfig, dp_size: int) -> Iterator[str]:
    parallel, micro = config.parallel, config.training.micro_batch_size
    size = parallel.pipeline_model_parallel_size
    count = global_batch_size(config) // (micro * dp_size)
    if parallel.virtual_pipeline_model_parallel_size is not None and (count < size or 0 < count % size < size):
        yield (
            f"{count} micro-batches per rank: the interleaved schedule needs a multiple of "
            f"parallel.pipeline_model_parallel_size={size}; change training.global_batch_size or micro_batch_size"
        )


def _dataset_problems(config: RunConfig) -> Iterator[str]:
    """Datasets that are here and were written for another model: said now, and not when the model is built."""
    model, data = config.model, config.data
    if None in (model.template, model.vocabulary.text_size, model.vq.num_codes):
        return
    for folder in dict.fromkeys((*data.train, *data.validation)):
        try:
            manifest = read_json(Path(folder) / "manifest.json")
        except DataError:
            continue  # not here, which is said elsewhere where it matters, or damaged, which the loader says
        if "template" in manifest:
            yield from manifest_problems(
                Path(folder),
                manifest,
                vocabulary=Vocabulary.from_config(model),
                tokenizer_hash=None,
                template=template_of(model),
                system_prompt=model.system_prompt,
                num_indices=model.vq.num_indices,
                max_image_side=data.max_image_side,
            )


def _missing_trackers(config: RunConfig) -> Iterator[str]:
    """Experiment trackers that are asked for and not installed, before the first hook looks for them."""
    for name, module, package in _TRACKERS:
        if (value := getattr(config.logging, name)) is not None and importlib.util.find_spec(module) is None:
            yield f"logging.{name}={value} needs the package {package}: pip install {package}, or set it to null"


_TRACKERS = (("wandb_project", "wandb", "wandb"), ("mlflow_experiment", "mlflow", "mlflow-skinny"))
"""Field of `logging`, name to import, name for pip."""


def _missing_paths(config: RunConfig) -> Iterator[str]:
    model = config.model
    for absent in absent_folders(model):
        yield f"{absent} is not a folder"
    if model.tokenizer is None and model.backbone is None:
        yield _NO_TOKENIZER
    yield from missing_inputs(config)
    outputs = {"output_dir": config.output_dir, "checkpoint.directory": config.checkpoint.directory}
    for name, value in outputs.items():
        if value is not None and (problem := why_not_writable(Path(value), is_folder=True)):
            yield f"{name}={value} cannot be written: {problem}; name another place"
    yield from _used_folder(config)


def _used_folder(config: RunConfig) -> Iterator[str]:
    """A new run among the checkpoints of another one would be taken for its continuation, and mixed up with it."""
    directory = Path(config.checkpoint.directory or Path(config.output_dir) / "checkpoints")
    if not config.checkpoint.resume and (used := sorted(directory.glob("step_" + "[0-9]" * 8))):
        yield (
            f"checkpoint.resume=false, but {directory} holds {used[-1].name} of an earlier run: name another "
            "output_dir, move those checkpoints away, or set checkpoint.resume=true"
        )


def missing_inputs(config: RunConfig) -> Iterator[str]:
    """Problems of the datasets and of the earlier stages that a run names, each in one line."""
    data = config.data
    if not data.train:
        yield "data.train is empty: name at least one folder written by hgpt preprocess"
    for name in ("train", "validation"):
        for value in getattr(data, name):
            if not (Path(value) / "manifest.json").is_file():
                yield f"data.{name}: {value} holds no manifest.json; write it with hgpt preprocess"
            elif data.feature_cache and not (Path(value) / data.feature_cache / "manifest.json").is_file():
                yield f"data.feature_cache: {value} has no {data.feature_cache}; write it with hgpt cache-features"
    for value in config.checkpoint.init_from:
        if not Path(value).exists():
            yield f"checkpoint.init_from: {value} does not exist; train the earlier stage first"
