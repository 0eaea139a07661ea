from __future__ import annotations

import pytest

from megatron_hgpt.batching import (
    data_parallel_size,
    global_batch_size,
    length_in_epochs,
    num_micro_batches,
    repetition_warning,
    replica_size,
    steps_per_epoch,
)
from megatron_hgpt.config import ParallelConfig, RunConfig
from megatron_hgpt.errors import ConfigError

LAYOUT = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=4)


def test_a_replica_takes_the_product_of_the_three_sizes() -> None:
    assert replica_size(LAYOUT) == 24
    assert data_parallel_size(RunConfig(parallel=LAYOUT), 72) == 3


@pytest.mark.parametrize("world_size", [1, 23, 25, 36])
def test_processes_that_hold_no_whole_number_of_replicas_are_refused_with_what_to_start(world_size: int) -> None:
    with pytest.raises(ConfigError, match=f"{world_size} processes cannot hold replicas of 24 .*multiple of 24"):
        data_parallel_size(RunConfig(parallel=LAYOUT), world_size)


def test_the_stage_s_batch_size_stands_where_none_is_configured() -> None:
    run = RunConfig()
    run.training.stage, run.training.micro_batch_size = "stage1_generation", 4
    assert global_batch_size(run) == 64
    assert num_micro_batches(run, 2) == 8
    run.training.global_batch_size = 24
    assert num_micro_batches(run, 2) == 3


@pytest.mark.parametrize(
    ("samples_per_task", "steps"),
    [
        ([16], 2),
        ([17], 3),  # one sample more opens another micro-batch, and that another step
        ([1, 1], 1),  # two micro-batches, as no micro-batch mixes tasks
        ([8, 1], 2),
        ([], 0),
    ],
)
def test_an_epoch_draws_every_sample_once_in_micro_batches_of_one_task(samples_per_task: list[int], steps: int) -> None:
    assert steps_per_epoch(samples_per_task, micro_batch_size=4, global_batch_size=8) == steps


def test_the_epochs_of_a_run_are_counted_in_samples_drawn() -> None:
    run = RunConfig()
    run.training.global_batch_size = 128
    assert length_in_epochs(run, 4, 5) == "4 steps = 512 samples drawn = 102.4 epochs of 5"
    assert length_in_epochs(run, 1, 100_000) == "1 step = 128 samples drawn = 0.001 epochs of 100,000"
    run.data.packing = "mixed"
    assert length_in_epochs(run, 1, 1280) == "1 step = 128 packed rows drawn = 0.1 epochs of 1,280"


def test_a_step_larger_than_the_data_is_a_warning() -> None:
    run = RunConfig()
    run.training.global_batch_size = 128
    assert repetition_warning(run, 128) is None
    text = "every step repeats samples: training.global_batch_size=128 and there are 127 samples; lower it, or add data"
    assert repetition_warning(run, 127) == text
    run.data.packing = "by_task"
    assert "there is 1 packed row;" in str(repetition_warning(run, 1))
