"""What a stage moves, and what it leaves alone: parameter groups, idle plugins, interrupted runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hgpt.config import CheckpointConfig, ParallelConfig, TrainingConfig
from megatron_hgpt.samples import MicroBatch, Task
from megatron_hgpt.stages import STAGES
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import FixedLoader, tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "phi3", num_layers=4)


def changed_groups(backbone: Path, folder: Path) -> dict[str, dict[str, list[str]]]:
    """Per stage, the groups of which some tensor changed in 3 steps, and those of which every tensor did."""
    from megatron_hgpt import distributed
    from megatron_hgpt.parameters import group_of

    context = distributed.initialize(ParallelConfig(), seed=1)
    result = {}
    for stage in STAGES:
        training = TrainingConfig(stage=stage, num_steps=3, precision="fp32", micro_batch_size=2, global_batch_size=8)
        trainer = build_trainer(tiny_config(backbone, folder / stage, training=training), context)
        before = {name: value.clone() for name, value in trainer.models[0].state_dict().items() if value is not None}
        for _ in range(3):
            trainer.train_step()
        vocabulary = trainer.models[0].vocabulary
        text_size = vocabulary.text_size
        moved: dict[str, set[bool]] = {}
        for name, value in trainer.models[0].state_dict().items():
            if value is None:
                continue
            group = group_of(name)
            if group == "vocabulary":
                rows = {
                    "old rows": slice(0, text_size),
                    "new rows": slice(text_size, vocabulary.size),
                }
                for key, part in rows.items():
                    moved.setdefault(key, set()).add(not torch.equal(value[part], before[name][part]))
            else:
                moved.setdefault(group, set()).add(not torch.equal(value, before[name]))
        result[stage] = {
            "some": sorted(group for group, changes in moved.items() if True in changes),
            "all": sorted(group for group, changes in moved.items() if changes == {True}),
        }
    return result


def test_each_stage_changes_exactly_its_groups(backbone: Path, tmp_path: Path) -> None:
    (result,) = run_ranks(changed_groups, 1, backbone, tmp_path)
    names = {"new_rows": ["new rows"], "vocabulary": ["old rows", "new rows"]}
    for stage, moved in result.items():
        expected = sorted(name for group in STAGES[stage].trainable for name in names.get(group, [group]))
        assert moved["some"] == expected, stage
        assert moved["all"] == expected, stage


def idle_plugin(backbone: Path, folder: Path) -> tuple[bool, bool]:
    """After two joint steps, a step with comprehension only: did the generation plugin move, did comprehension?"""
    from megatron_hgpt import distributed

    context = distributed.initialize(ParallelConfig(), seed=1)
    training = TrainingConfig(
        stage="stage3_joint", num_steps=9, precision="fp32", micro_batch_size=2, global_batch_size=8
    )
    trainer = build_trainer(tiny_config(backbone, folder, training=training), context)
    trainer.train_step(), trainer.train_step()
    trainer.loader.tasks = (Task.COMPREHENSION,)

    def snapshot() -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in trainer.models[0].named_parameters() if ".hlora." in name}

    before = snapshot()
    trainer.train_step()
    after = snapshot()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    return any(".generation." in name for name in moved), any(".comprehension." in name for name in moved)


def test_an_idle_plugin_does_not_move(backbone: Path, tmp_path: Path) -> None:
    assert run_ranks(idle_plugin, 1, backbone, tmp_path)[0] == (False, True)


def train_and_resume(backbone: Path, folder: Path, parallel: ParallelConfig, precision: str) -> dict[str, Any]:
    """Six steps in one go, and three plus three through a checkpoint: parameters of both, with dropout on."""
    from megatron_hgpt import distributed

    context = distributed.initialize(parallel, seed=1)

    def run(name: str, steps: int, total: int = 6) -> Any:
        training = TrainingConfig(
            stage="stage3_joint", num_steps=total, precision=precision, micro_batch_size=2, global_batch_size=8
        )
        config = tiny_config(
            backbone, folder / name, parallel=parallel, training=training,
            checkpoint=CheckpointConfig(save_interval_steps=3, keep_last=1),
        )  # fmt: skip
        config.model.hlora.comprehension.dropout = 0.3
        config.optimizer.schedule = "cosine"
        distributed.seed_everything(context, 1)
        trainer = build_trainer(config, context)
        trainer.total_steps = steps
        trainer.fit()
        return trainer

    whole = run("whole", 6)
    run("parts", 3)
    resumed = run("parts", 6)
    pairs = zip(whole.models[0].named_parameters(), resumed.models[0].named_parameters(), strict=True)
    different = [name for (name, a), (_, b) in pairs if not torch.equal(a, b)]
    kept = sorted(path.name for path in (folder / "parts" / "checkpoints").iterdir())
    return {"different": different, "kept": kept, "steps": resumed.step}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_with_the_same_weights(precision: str, backbone: Path, tmp_path: Path) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    for outcome in run_ranks(train_and_resume, 2, backbone, tmp_path, parallel, precision):
        assert outcome == {"different": [], "kept": ["step_00000006"], "steps": 6}


class TextOnly(FixedLoader):
    """Without images nothing in front of the first layer trains: its input needs no gradient by itself."""

    def next_step(self) -> list[MicroBatch]:
        return [
            dataclasses.replace(
                batch, image_mask=torch.zeros_like(batch.image_mask), pixel_values=batch.pixel_values[:0]
            )
            for batch in super().next_step()
        ]


def train_on_text(backbone: Path, folder: Path) -> dict[str, list[float]]:
    """(loss, gradient norm) of three steps of stage 3, by kind of recomputation."""
    from megatron_hgpt import distributed

    context = distributed.initialize(ParallelConfig(), seed=1)
    curves = {}
    for recompute in (None, "selective", "full"):
        training = TrainingConfig(
            stage="stage3_joint", num_steps=3, precision="fp32", micro_batch_size=2, global_batch_size=8,
            recompute=recompute,
        )  # fmt: skip
        trainer = build_trainer(tiny_config(backbone, folder, training=training), context, loader_class=TextOnly)
        records = [trainer.train_step() for _ in range(3)]
        curves[str(recompute)] = [value for record in records for value in (record.loss, record.grad_norm)]
    return curves


def test_recomputed_layers_train_on_text_alone(backbone: Path, tmp_path: Path) -> None:
    (curves,) = run_ranks(train_on_text, 1, backbone, tmp_path)
    assert curves["selective"] == pytest.approx(curves["None"], rel=1e-6)
    assert curves["full"] == pytest.approx(curves["None"], rel=1e-6)
    assert all(norm > 0 for norm in curves["full"][1::2])
