"""A checkpoint of one layout resumes at any other, with the loss curve of the run that was never cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.config import CheckpointConfig, ParallelConfig, TrainingConfig
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer

# As in test_training_parity: other orders of fp32 sums, amplified by Adam over eight steps.
RELATIVE = 2e-5
SAVED_AT, NUM_STEPS = 3, 8

SAVED = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
RESUMED: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "DP2 + distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "TP4": (4, {"tensor_model_parallel_size": 4}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
}


def train(backbone: Path, folder: Path, parallel: dict[str, Any], last_step: int) -> list[float]:
    """(loss, gradient norm) of the steps up to `last_step`, from the newest checkpoint in `folder` if there is one."""
    from megatron_hgpt import distributed
    from megatron_hgpt.hooks.base import Hook

    layout = ParallelConfig(**parallel)
    context = distributed.initialize(layout, seed=1)
    training = TrainingConfig(
        stage="stage3_joint", num_steps=NUM_STEPS, precision="fp32", micro_batch_size=2, global_batch_size=8
    )
    checkpoint = CheckpointConfig(save_interval_steps=SAVED_AT)
    config = tiny_config(backbone, folder, parallel=layout, training=training, checkpoint=checkpoint)
    curve: list[float] = []

    class Recorder(Hook):
        def on_step_end(self, state: Any, record: Any) -> None:
            curve.extend((record.loss, record.grad_norm))

    trainer = build_trainer(config, context, total_steps=last_step, hooks=[Recorder()])
    trainer.fit()
    return curve


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "phi3", num_layers=4)


@pytest.fixture(scope="module")
def whole(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run_ranks(train, 1, backbone, tmp_path_factory.mktemp("whole"), {}, NUM_STEPS)[0]


@pytest.fixture(scope="module")
def saved(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(train, 4, backbone, folder, SAVED, SAVED_AT)
    return folder


@pytest.mark.parametrize("layout", RESUMED)
def test_the_next_steps_are_those_of_the_uninterrupted_run(
    layout: str, backbone: Path, saved: Path, whole: list[float], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(saved, tmp_path / "run")
    world_size, parallel = RESUMED[layout]
    for curve in run_ranks(train, world_size, backbone, tmp_path / "run", parallel, NUM_STEPS):
        assert curve == pytest.approx(whole[2 * SAVED_AT :], rel=RELATIVE)


def test_a_run_of_the_distributed_optimizer_resumes_without_it(
    backbone: Path, whole: list[float], tmp_path: Path
) -> None:
    first = run_ranks(train, 2, backbone, tmp_path, {"use_distributed_optimizer": True}, SAVED_AT)[0]
    then = run_ranks(train, 1, backbone, tmp_path, {}, NUM_STEPS)[0]
    assert [*first, *then] == pytest.approx(whole, rel=RELATIVE)
