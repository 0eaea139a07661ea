"""Replicas, micro-batches and steps: the arithmetic that loader, validation, dry run and planner share."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_hgpt.config import ParallelConfig, RunConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.rounding import ceil_div, plural
from megatron_hgpt.stages import resolve_stage


def replica_size(parallel: ParallelConfig) -> int:
    """Processes that hold one replica of the model."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Replicas of the model.

    Raises:
        ConfigError: the layout does not divide the number of processes.
    """
    parallel = config.parallel
    one = replica_size(parallel)
    if one < 1 or world_size % one:
        raise ConfigError(
            f"{world_size} processes cannot hold replicas of {one} (tensor {parallel.tensor_model_parallel_size} x "
            f"pipeline {parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size}); start a "
            f"multiple of {one}, e.g. torchrun --nproc-per-node {one}"
        )
    return world_size // one


def global_batch_size(config: RunConfig) -> int:
    """Samples per optimizer step: the configured number, or the stage's."""
    configured = config.training.global_batch_size
    return resolve_stage(config.training).global_batch_size if configured is None else configured


def num_micro_batches(config: RunConfig, dp_size: int) -> int:
    """Micro-batches of one rank in an optimizer step."""
    return global_batch_size(config) // (config.training.micro_batch_size * dp_size)


def steps_per_epoch(samples_per_task: Iterable[int], *, micro_batch_size: int, global_batch_size: int) -> int:
    """Optimizer steps after which every sample was drawn once: a micro-batch holds samples of one task."""
    micro_batches = sum(ceil_div(count, micro_batch_size) for count in samples_per_task)
    return ceil_div(micro_batches, global_batch_size // micro_batch_size)


def length_in_epochs(config: RunConfig, num_steps: int, epoch_size: int) -> str:
    """``120 steps = 480 samples drawn = 1.3 epochs of 364``.

    Args:
        config: for the batch size and packing.
        num_steps: optimizer steps of the run.
        epoch_size: samples that the stage trains on, or packed rows of them; above 0.
    """
    drawn = num_steps * global_batch_size(config)
    epochs = drawn / epoch_size
    figure = f"{epochs:,.1f}" if epochs >= 0.05 else f"{epochs:.1g}"
    return f"{plural(num_steps, 'step')} = {plural(drawn, _unit(config))} drawn = {figure} epochs of {epoch_size:,}"


def repetition_warning(config: RunConfig, epoch_size: int) -> str | None:
    """What to know where a step draws more samples (or packed rows) than there are; None where it does not."""
    total = global_batch_size(config)
    if total <= epoch_size:
        return None
    there = "there is" if epoch_size == 1 else "there are"
    return (
        f"every step repeats samples: training.global_batch_size={total} and {there} "
        f"{plural(epoch_size, _unit(config))}; lower it, or add data"
    )


def _unit(config: RunConfig) -> str:
    return "sample" if config.data.packing == "none" else "packed row"
