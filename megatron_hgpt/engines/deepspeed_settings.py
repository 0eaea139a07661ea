"""From a run's configuration to DeepSpeed's JSON, and what is refused on the way. Does not import DeepSpeed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_hgpt.backbone.implementation import LOCAL, resolve_transformer_impl
from megatron_hgpt.config import EngineConfig, RunConfig
from megatron_hgpt.errors import did_you_mean

_OPEN_SECTIONS = (
    "comms_logger",
    "communication_data_type",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_optimization",
)
"""Top-level fields of DeepSpeed's JSON that `engine.overrides` may hold; the others belong to our sections."""
_CLOSED_ZERO_FIELDS = ("cpu_offload", "elastic_checkpoint", "leaf_module", "load_from_fp32_weights", "zenflow")
"""Fields of zero_optimization that would undo what this engine arranges (checkpoints, offload, module hooks)."""
_ONE_SUB_GROUP = 10**15
"""Elements: more than any parameter group has, so that AdamW's step count, kept per group, advances once a step."""


def engine_problems(config: RunConfig) -> Iterator[str]:
    """What does not fit together in `engine` and the sections it touches, as messages."""
    engine, parallel = config.engine, config.parallel
    if engine.name == "megatron":
        idle = EngineConfig()
        for name in ("zero_stage", "offload_optimizer", "offload_parameters", "overrides"):
            if (value := getattr(engine, name)) != getattr(idle, name):
                yield (
                    f"engine.{name}={value} needs engine.name=deepspeed and is ignored by megatron; leave it out, or "
                    "set engine.name"
                )
        return
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(parallel, name) != 1:
            yield (
                f"parallel.{name}={getattr(parallel, name)} needs engine.name=megatron; DeepSpeed's engine runs with 1 "
                "(data parallel only)"
            )
    if parallel.sequence_parallel:
        yield "parallel.sequence_parallel=true needs engine.name=megatron; set it to false for DeepSpeed"
    if config.optimizer.cpu_offload:
        yield "optimizer.cpu_offload=true needs engine.name=megatron; use engine.offload_optimizer=cpu for DeepSpeed"
    if parallel.use_distributed_optimizer:
        yield (
            "parallel.use_distributed_optimizer=true is Megatron's ZeRO-1; with engine.name=deepspeed set it to false "
            "and choose engine.zero_stage"
        )
    if engine.offload_parameters == "cpu" and engine.zero_stage != 3:
        yield (
            f"engine.offload_parameters=cpu needs engine.zero_stage=3, it is {engine.zero_stage}: the other stages do "
            "not shard the weights"
        )
    if config.training.precision == "fp8" or config.model.transformer_impl == "transformer_engine":
        yield (
            f"engine.name=deepspeed runs on local layers, but training.precision={config.training.precision} and "
            f"model.transformer_impl={config.model.transformer_impl}; use bf16 or fp32, and local"
        )
    if config.optimizer.megatron_overrides:
        yield "optimizer.megatron_overrides need engine.name=megatron; DeepSpeed's fields go into engine.overrides"
    if engine.zero_stage == 3 and config.logging.sample_images_interval_steps:
        yield (
            f"logging.sample_images_interval_steps={config.logging.sample_images_interval_steps} needs whole weights; "
            "set it to 0, or use engine.zero_stage 1 or 2"
        )
    yield from _override_problems(config)


def missing_requirements(config: RunConfig) -> Iterator[str]:
    """What this machine lacks for the engine, as messages."""
    if config.engine.name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        yield "engine.name=deepspeed needs the package deepspeed: DS_BUILD_OPS=0 pip install -e '.[deepspeed]'"
    if config.engine.name == "deepspeed" and resolve_transformer_impl(config.model, config.training) != LOCAL:
        yield (
            f"engine.name=deepspeed runs on local layers, but model.transformer_impl={config.model.transformer_impl} "
            "chooses Transformer Engine here; set model.transformer_impl=local"
        )


def _override_problems(config: RunConfig) -> Iterator[str]:
    overrides = config.engine.overrides
    for name in overrides:
        if name not in _OPEN_SECTIONS:
            hint = did_you_mean(name, _OPEN_SECTIONS) or "; optimizer, training and engine decide the rest"
            yield f"engine.overrides.{name} is not one of {', '.join(_OPEN_SECTIONS)}{hint}"
    zero = overrides.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield f"engine.overrides.zero_optimization={zero!r} must be a mapping of DeepSpeed's ZeRO fields"
        return
    for name in _CLOSED_ZERO_FIELDS:
        if name in zero:
            yield f"engine.overrides.zero_optimization.{name} is not supported by this engine; leave it out"
    decided = set(_paths(_decided(config)))
    for path in _paths(overrides):
        if any(path == ours or ours.startswith(f"{path}.") for ours in decided):
            yield f"engine.overrides.{path} is decided by engine, optimizer or training; set it there"


def _paths(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of the leaves."""
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _decided(config: RunConfig) -> dict[str, Any]:
    """The part of DeepSpeed's JSON that our sections decide."""
    engine = config.engine
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "sub_group_size": _ONE_SUB_GROUP,
        "offload_optimizer": {"device": engine.offload_optimizer},
    }
    if engine.zero_stage == 3:
        zero["offload_param"] = {"device": engine.offload_parameters}
    return {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        # The engine accumulates the micro-batches of a step itself, weighted by their tokens.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_grad,
        "bf16": {"enabled": config.training.precision == "bf16"},
        "zero_optimization": zero,
        # AdamW is this package's: it leaves idle groups alone, on either device.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def deepspeed_json(config: RunConfig) -> dict[str, Any]:
    """The dictionary that deepspeed.initialize reads: what our sections decide, and `engine.overrides`."""
    defaults = {
        # bf16 gradients of the ranks are summed in fp32, as Megatron's engine does.
        "communication_data_type": "fp32",
        # Stage 3 would replace torch's linear in the whole process by one that rounds differently in bf16. It would
        # save little: the frozen weights are in Megatron's linears, which keep no gathered weight for backward.
        "zero_optimization": {"memory_efficient_linear": False},
    }
    return _merged(_merged(defaults, _decided(config)), config.engine.overrides)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = _merged(result[name], value) if both else value
    return result
