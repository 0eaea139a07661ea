"""Held-out samples: in stored order, each counted once at every layout, the same number of micro-batches everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hgpt.config import RunConfig
from megatron_hgpt.data.validation_loader import ValidationChunk, ValidationLoader, build_validation_loader
from megatron_hgpt.errors import DataError
from megatron_hgpt.samples import Task

C, G = Task.COMPREHENSION, Task.GENERATION
Make = Callable[..., Path]


def _loader(folders: Sequence[Path], *, tasks: Sequence[Task] = (C, G), **changes: Any) -> ValidationLoader | None:
    config = RunConfig()
    config.model.template = "phi3_instruct"
    config.data.validation = [str(folder) for folder in folders]
    config.data.num_workers = changes.pop("num_workers", 0)
    config.model.vocabulary.text_size, config.model.vq.num_codes, config.model.vq.num_indices = 400, 16, 4
    config.training.micro_batch_size = 2
    config.training.validation_samples = changes.pop("validation_samples", None)
    config.parallel.pipeline_model_parallel_size = changes.pop("pipeline", 1)
    config.parallel.virtual_pipeline_model_parallel_size = changes.pop("virtual", None)
    return build_validation_loader(
        config, tokenizer_hash="abc", num_image_tokens=3, image_size=8, tasks=tasks, **changes
    )


def _chunks(folders: Sequence[Path], **changes: Any) -> list[ValidationChunk]:
    loader = _loader(folders, **changes)
    assert loader is not None
    return list(loader.chunks())


def _counted(chunks: Sequence[ValidationChunk]) -> list[tuple[str, ...]]:
    return [
        tuple(batch.sample_ids)
        for chunk in chunks
        for batch, is_counted in zip(chunk.batches, chunk.is_counted, strict=True)
        if is_counted
    ]


@pytest.fixture
def folder(tmp_path: Path, make_dataset: Make) -> Path:
    """6 comprehension and 2 generation samples, one of which has no readable picture."""
    return make_dataset(tmp_path / "v", [C] * 3 + [G] * 2 + [C] * 3, bad=[4])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_in_stored_order_task_by_task(folder: Path, num_workers: int, caplog: pytest.LogCaptureFixture) -> None:
    loader = _loader([folder], num_workers=num_workers)
    assert loader is not None
    assert loader.num_samples == {C: 6, G: 2}
    first, second = list(loader.chunks()), list(loader.chunks())
    assert _counted(first) == _counted(second) == [("c0", "c1"), ("c2", "c5"), ("c6", "c7"), ("g3",)]
    assert torch.equal(first[0].batches[0].tokens, second[0].batches[0].tokens)
    assert caplog.text.count("validation sample left out") == 1, "said once, not at every validation"


@pytest.mark.parametrize("dp_size", [2, 3, 5])
def test_ranks_share_the_samples_and_work_in_step(folder: Path, dp_size: int) -> None:
    ranks = [_chunks([folder], dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    assert len({tuple(len(chunk.batches) for chunk in chunks) for chunks in ranks}) == 1
    merged = sorted(ids for chunks in ranks for ids in _counted(chunks))
    assert merged == [("c0", "c1"), ("c2", "c5"), ("c6", "c7"), ("g3",)]


def test_a_micro_batch_without_a_usable_sample_is_replaced_and_not_counted(tmp_path: Path, make_dataset: Make) -> None:
    folder = make_dataset(tmp_path / "v", [C] * 6, bad=[2, 3])
    (chunk,) = _chunks([folder], tasks=[C])
    assert [tuple(batch.sample_ids) for batch in chunk.batches] == [("c0", "c1"), ("c4", "c5"), ("c4", "c5")]
    assert chunk.is_counted == [True, False, True]


def test_the_interleaved_schedule_gets_multiples_of_its_stages(tmp_path: Path, make_dataset: Make) -> None:
    folder = make_dataset(tmp_path / "v", [C] * 70)
    chunks = _chunks([folder], tasks=[C], pipeline=3, virtual=2)
    assert [len(chunk.batches) for chunk in chunks] == [18, 18]
    assert len(_counted(chunks)) == 35
    assert [len(chunk.batches) for chunk in _chunks([folder], tasks=[C], pipeline=3)] == [16, 16, 3]


def test_the_number_of_samples_can_be_limited(folder: Path) -> None:
    assert _counted(_chunks([folder], validation_samples=3)) == [("c0", "c1"), ("c2",), ("g3",)]


def test_sequences_are_padded_for_sequence_parallelism(folder: Path) -> None:
    assert _chunks([folder], pad_to_multiple=4)[0].batches[0].tokens.shape == (2, 8)  # 6 positions rounded up


def test_nothing_to_validate(tmp_path: Path, make_dataset: Make) -> None:
    assert _loader([]) is None
    with pytest.raises(DataError, match=r"data\.validation has no generation sample, which the stage trains"):
        _loader([make_dataset(tmp_path / "c", [C])], tasks=[G])
    with pytest.raises(DataError, match=r"no sample of data\.validation can be used"):
        _chunks([make_dataset(tmp_path / "bad", [C], bad=[0])], tasks=[C])
