"""Checkpoints that are written beside training, and the frozen weights they belong to."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_hgpt.config import CheckpointConfig, ParallelConfig, TrainingConfig
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "DP2 + distributed optimizer": (2, {"use_distributed_optimizer": True}),
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "phi3")


def make_trainer(backbone: Path, folder: Path, parallel: dict[str, Any], hooks: Sequence[Any] = ()) -> Any:
    from megatron_hgpt import distributed

    layout = ParallelConfig(**parallel)
    context = distributed.initialize(layout, seed=1)
    training = TrainingConfig(
        stage="stage3_joint", num_steps=4, precision="fp32", micro_batch_size=2, global_batch_size=8
    )
    checkpoint = CheckpointConfig(save_interval_steps=2, keep_last=0, async_save=True)
    config = tiny_config(backbone, folder, parallel=layout, training=training, checkpoint=checkpoint)
    return build_trainer(config, context, hooks=hooks)


def save(trainer: Any) -> None:
    trainer.checkpointer.save(
        trainer.models, trainer.engine, step=trainer.step, loader_state=trainer.loader.state_dict()
    )


def held_back(go: Path) -> Callable[[int], None]:
    """An fsync that waits for a file: the writer's thread cannot finish before."""

    def fsync(_descriptor: int) -> None:
        deadline = time.monotonic() + 120
        while not go.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return fsync


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in trainer.models[0].named_parameters() if p.requires_grad}


def train_while_writing(backbone: Path, folder: Path, parallel: dict[str, Any]) -> None:
    """Save, train on while the writer is held back, let it go; the checkpoint holds the weights of the save."""
    trainer = make_trainer(backbone, folder, parallel)
    go, checkpointer = folder / "go", trainer.checkpointer
    for _ in range(2):
        trainer.train_step()
    parameters = weights(trainer)
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    final = checkpointer.directory / "step_00000002"
    with mock.patch.object(os, "fsync", held_back(go)):
        save(trainer)
        trainer.train_step()
        assert checkpointer.published() == []
        assert not final.exists() and final.with_name("step_00000002.1.tmp").is_dir()
        assert not Path(f"/proc/self/task/{os.getpid()}/children").read_text(), "no process to outlive this one"
        changed = [name for name, value in saved.items() if not torch.equal(parameters[name], value)]
        assert len(changed) == len(saved)
        torch.distributed.barrier()
        go.touch()
        (saved_checkpoint,) = checkpointer.published(wait=True)
    assert saved_checkpoint.path == final
    assert saved_checkpoint.save_time_s > 0
    size = sum(file.stat().st_size for file in final.iterdir())
    assert saved_checkpoint.num_bytes == (size if checkpointer.is_writer else 0)
    assert checkpointer.published(wait=True) == []
    assert final.is_dir() and not list(checkpointer.directory.glob("*.tmp"))

    from megatron_hgpt.checkpoint import load_weights

    load_weights(trainer.models, trainer.config, [str(final)])
    assert all(torch.equal(parameters[name], value) for name, value in saved.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_on_while_a_checkpoint_is_written(layout: str, backbone: Path, tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    run_ranks(train_while_writing, world_size, backbone, tmp_path, parallel)


def fit(backbone: Path, folder: Path, tensor_parallel: int = 2) -> tuple[list[str], list[float]]:
    """Names of the checkpoints announced to hooks, and the losses."""
    from megatron_hgpt.hooks.base import Hook

    trainer = make_trainer(backbone, folder, {"tensor_model_parallel_size": tensor_parallel})
    announced: list[str] = []
    losses: list[float] = []

    class Recorder(Hook):
        def on_step_end(self, state: Any, record: Any) -> None:
            losses.append(record.loss)

        def on_checkpoint_saved(self, state: Any, checkpoint: Any) -> None:
            assert checkpoint.path.is_dir()
            announced.append(checkpoint.path.name)

    trainer.hooks.append(Recorder())
    trainer.fit()
    return announced, losses


def test_a_run_announces_every_checkpoint_and_resumes(backbone: Path, tmp_path: Path) -> None:

    (tmp_path / "checkpoints" / "step_00000009.tmp").mkdir(parents=True)
    for announced, _ in (whole := run_ranks(fit, 2, backbone, tmp_path)):
        assert announced == ["step_00000002", "step_00000004"]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    for announced, losses in run_ranks(fit, 2, backbone, tmp_path):
        assert announced == ["step_00000004"]
        assert losses == pytest.approx(whole[0][1][2:], rel=1e-6)


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor of model and optimizer in a checkpoint, as torch's own reader sees it."""
    metadata = FileSystemReader(folder).read_metadata()
    shapes = {name: tuple(stored.size) for name, stored in metadata.state_dict_metadata.items()}
    return {name: shape for name, shape in shapes.items() if not name.startswith("rng/")}


def test_shards_make_whole_tensors_of_all_that_trains_and_of_nothing_frozen(backbone: Path, tmp_path: Path) -> None:
    shapes = []
    for size in (1, 2):
        run_ranks(fit, size, backbone, tmp_path / str(size), size)
        shapes.append(saved_shapes(tmp_path / str(size) / "checkpoints" / "step_00000004"))
    assert shapes[0] == shapes[1]
    model = {name: shape for name, shape in shapes[0].items() if not name.startswith("optimizer.")}
    plugins = {name: shape for name, shape in model.items() if ".hlora." in name}
    # Two plugins on four linears: P of each, B for q, k, v | out | gate, up | out. Layers are stacked in one tensor.
    assert len(plugins) == 2 * (4 + 3 + 1 + 2 + 1)
    assert {shape[0] for shape in plugins.values()} == {2}
    assert {name.split(".")[0] for name in model} == {"language_model", "adapters"}
    rest = model.keys() - plugins.keys()
    assert sum(name.startswith("adapters.") for name in rest) == 2 * 4  # two linears each, weight and bias
    assert {name for name in rest if not name.startswith("adapters.")} == {
        "language_model.embedding.word_embeddings.weight",
        "language_model.output_layer.weight",
    }
    # AdamW: two moments (and here no fp32 copy: the weights are fp32) of what stage 3 trains.
    trained = len(plugins) + 2 * 4
    assert sum(name.startswith("optimizer.") for name in shapes[0]) == 2 * trained


def load_on(backbone: Path, folder: Path, checkpoint: Path) -> str:
    from megatron_hgpt.checkpoint import load_weights
    from megatron_hgpt.errors import CheckpointError

    trainer = make_trainer(backbone, folder, {})
    try:
        load_weights(trainer.models, trainer.config, [str(checkpoint)])
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_other_frozen_weights_are_refused(backbone: Path, tmp_path: Path) -> None:
    """As sizes are alike, nothing else would say so: the answers would just be bad."""
    run_ranks(fit, 2, backbone, tmp_path)
    other = shutil.copytree(backbone, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: value + 0.01 for name, value in tensors.items()}, other / "model.safetensors")
    assert run_ranks(load_on, 1, backbone, tmp_path / "again", tmp_path) == ["loaded"]
    (message,) = run_ranks(load_on, 1, other, tmp_path / "again", tmp_path)
    assert "was trained on other frozen weights: backbone: the model has sha256:" in message
    assert "model.backbone" in message
