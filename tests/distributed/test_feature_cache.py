"""Training from cached features gives the losses of training from pictures, without the tower."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_hgpt.config import DataConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_hgpt.data.dataset import describe_vocabulary
from megatron_hgpt.data.feature_cache_writer import CacheOptions, cache_features
from megatron_hgpt.data.mmap_format import DatasetWriter
from megatron_hgpt.files import sealed
from megatron_hgpt.samples import IMAGE_TOKEN_ID, TASKS, Task
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import NUM_CODES, NUM_IMAGE_TOKENS, TEXT_SIZE, tiny_config, write_backbone
from megatron_hgpt.text.templates import resolve_system_prompt
from megatron_hgpt.text.vocabulary import Vocabulary
from megatron_hgpt.vision.clip import HVPTower

# fp32: the tower sees the pictures in other batches, and so sums in another order.
RELATIVE = 1e-6
STAGES = ("stage1_comprehension", "stage1_joint", "stage3_joint", "stage3_joint packed")
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "one process": (1, ParallelConfig()),
    "TP2 + SP": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
}


def configure(backbone: Path, folder: Path, **sections: Any) -> RunConfig:
    """The tiny run with a third block in the tower, so that the tasks read different depths: 2 and 1."""
    config = tiny_config(backbone, folder, **sections)
    config.model.vision.hf_config["num_hidden_layers"] = 3
    return config


def write_dataset(folder: Path) -> Path:
    """Samples of both tasks with one, two or no noise pictures; some pictures are shared."""
    random = np.random.default_rng(3)
    pictures = []
    for side in range(12, 22):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (side, 16, 3), np.uint8)).save(buffer, format="PNG")
        pictures.append(buffer.getvalue())
    with DatasetWriter(folder) as writer:
        for i in range(24):
            task = TASKS[i % 2]
            images = [pictures[i % 10]] * (i % 8 != 3) + [pictures[i % 7]] * (i % 6 == 4)
            low = 1 if task is Task.COMPREHENSION else TEXT_SIZE + 1
            answer = random.integers(low, low + NUM_CODES, 3 + i % 4).tolist()
            tokens = [1, *[IMAGE_TOKEN_ID] * len(images), 5 + i, *answer]
            mask = [False] * (len(tokens) - len(answer)) + [True] * len(answer)
            writer.add(sample_id=str(i), task=task, tokens=tokens, loss_mask=mask, images=images)
        writer.finish(
            {
                "tokenizer": {"sha256": "abc"},
                "template": {"name": "phi3_instruct", "system_prompt": resolve_system_prompt("phi3_instruct", None)},
                "vocabulary": describe_vocabulary(Vocabulary(text_size=TEXT_SIZE, num_codes=NUM_CODES)),
            }
        )
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A backbone; and a dataset with its fp32 cache, and one of swapped depths that claims to be right."""
    root = tmp_path_factory.mktemp("prepared")
    backbone, dataset = write_backbone(root / "backbone"), write_dataset(root / "data")
    vision = configure(backbone, root).model.vision
    right = (vision.comprehension_hidden_state, vision.generation_hidden_state)
    for name, depths in (("features", right), ("wrong", right[::-1])):
        vision.comprehension_hidden_state, vision.generation_hidden_state = depths
        options = CacheOptions(precision="fp32", dtype="fp32", batch_size=4)
        tower = HVPTower.from_config(vision, TASKS)
        cache_features(dataset, dataset / name, tower=tower, vision=vision, options=options)
    wrong, right_blocks = dataset / "wrong" / "manifest.json", dataset / "features" / "manifest.json"
    forged = {**json.loads(wrong.read_text()), "num_blocks": json.loads(right_blocks.read_text())["num_blocks"]}
    wrong.write_text(json.dumps(sealed(forged)))
    return backbone, dataset


def train(backbone: Path, dataset: Path, folder: Path, parallel: ParallelConfig, caches: list) -> dict[str, Any]:
    """(loss, gradient norm) of three steps of each stage, for each cache (None: pictures)."""
    from megatron_hgpt import distributed

    context = distributed.initialize(parallel, seed=1)
    from megatron_hgpt.build import build_model_chunks, freeze_except
    from megatron_hgpt.checkpoint import Checkpointer
    from megatron_hgpt.data.loader import build_loader
    from megatron_hgpt.stages import resolve_stage
    from megatron_hgpt.testing.models import make_b_nonzero
    from megatron_hgpt.trainer import Trainer

    def run(stage_name: str, cache: str | None) -> list[float]:
        stage_name, *packed = stage_name.split()
        size = 1 if packed else 2
        training = TrainingConfig(
            stage=stage_name, num_steps=3, precision="fp32", micro_batch_size=size, global_batch_size=4 * size
        )
        data = DataConfig(
            train=[str(dataset)], feature_cache=cache, num_workers=0, packing="mixed" if packed else "none"
        )
        config = configure(backbone, folder, parallel=parallel, training=training, data=data)
        stage = resolve_stage(training)
        (model,) = build_model_chunks(config, context.device, dropout=dict(stage.dropout), with_tower=cache is None)
        assert (model.tower is None) == (cache is not None or not model.pre_process)
        make_b_nonzero(model)
        freeze_except([model], stage.trainable)
        loader = build_loader(
            config, tokenizer_hash="abc", num_image_tokens=NUM_IMAGE_TOKENS, image_size=16, dp_rank=context.dp_rank,
            dp_size=context.dp_size, tasks=stage.tasks, global_batch_size=4 * size, pad_to_multiple=context.tp_size,
        )  # fmt: skip
        trainer = Trainer(
            config=config, stage=stage, context=context, models=[model], loader=loader, total_steps=3,
            checkpointer=Checkpointer(config, trained_groups=stage.trainable, is_writer=context.is_writer),
        )  # fmt: skip
        records = [trainer.train_step() for _ in range(3)]
        return [record.loss for record in records] + [record.grad_norm for record in records]

    return {f"{stage}, {cache}": run(stage, cache) for stage in STAGES for cache in caches}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cache_gives_the_losses_of_the_pictures(layout: str, prepared: tuple[Path, Path], tmp_path: Path) -> None:
    world_size, parallel = LAYOUTS[layout]
    for curves in run_ranks(train, world_size, *prepared, tmp_path, parallel, [None, "features"]):
        for stage in STAGES:
            losses, norms = curves[f"{stage}, None"][:3], curves[f"{stage}, None"][3:]
            assert curves[f"{stage}, features"][:3] == pytest.approx(losses, rel=RELATIVE), stage
            assert curves[f"{stage}, features"][3:] == pytest.approx(norms, rel=10 * RELATIVE), stage
            assert len(set(losses)) == 3


def test_a_cache_of_the_wrong_depth_would_show(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    (curves,) = run_ranks(train, 1, *prepared, tmp_path, ParallelConfig(), [None, "wrong"])
    for stage in STAGES:
        for expected, wrong in zip(curves[f"{stage}, None"], curves[f"{stage}, wrong"], strict=True):
            assert wrong != pytest.approx(expected, rel=100 * RELATIVE), stage


def pictures_without_a_tower(backbone: Path, folder: Path) -> str:
    """What a model without its tower says to pixels."""
    from megatron_hgpt import distributed
    from megatron_hgpt.build import build_model_chunks
    from megatron_hgpt.errors import DataError
    from megatron_hgpt.testing.models import make_micro_batch

    context = distributed.initialize(ParallelConfig(), seed=1)
    (model,) = build_model_chunks(configure(backbone, folder), context.device, with_tower=False)
    try:
        model(make_micro_batch("a", Task.COMPREHENSION))
    except DataError as error:
        return str(error)
    return "no error"


def test_pictures_are_refused_without_the_tower(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    (message,) = run_ranks(pictures_without_a_tower, 1, prepared[0], tmp_path)
    assert "without its tower; unset data.feature_cache" in message
