"""Packed rows: every sample once, no row too long, nearly full; and what a row looks like to the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hgpt.config import RunConfig
from megatron_hgpt.data.collate import ExpandedSample, collate_packed
from megatron_hgpt.data.loader import TrainLoader, build_loader
from megatron_hgpt.data.packing import pack
from megatron_hgpt.errors import ConfigError, DataError
from megatron_hgpt.samples import IGNORE_INDEX, EncodedSample, Task

C, G = Task.COMPREHENSION, Task.GENERATION
X = IGNORE_INDEX
Make = Callable[..., Path]


@pytest.mark.parametrize("seed", range(3))
def test_rows_hold_every_sample_once_and_are_nearly_full(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(20, 700, 2000)
    rows = pack(lengths, 2048, seed=seed)
    assert sorted(np.concatenate(rows).tolist()) == list(range(2000))
    fills = [int(lengths[row].sum()) for row in rows]
    assert max(fills) <= 2048
    assert len(rows) <= np.ceil(lengths.sum() / 2048) * 1.01


def test_rows_depend_on_the_seed_alone() -> None:
    lengths = np.random.default_rng(0).integers(20, 90, 300)
    rows = [row.tolist() for row in pack(lengths, 128, seed=5)]
    assert rows == [row.tolist() for row in pack(lengths, 128, seed=5)]
    assert rows != [row.tolist() for row in pack(lengths, 128, seed=6)]


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.pack_length=10 is shorter than the longest sample \(11 tokens\)"):
        pack(np.array([3, 11]), 10, seed=0)


def _sample(task: Task, tokens: list[int], labels: list[int], num_images: int) -> tuple[EncodedSample, ExpandedSample]:
    ids = torch.tensor(tokens)
    stored = EncodedSample(
        sample_id=f"{task.value[0]}{len(tokens)}", task=task, tokens=ids, loss_mask=ids > 0, images=[]
    )
    return stored, ExpandedSample(
        sample_id=stored.sample_id,
        tokens=ids,
        labels=torch.tensor(labels),
        image_mask=ids == 0,
        pixel_values=[torch.full((3, 2, 2), float(len(tokens)))] * num_images,
        features=[],
        is_truncated=False,
    )


def test_a_row_of_both_tasks() -> None:
    row = collate_packed(
        [_sample(C, [1, 0, 5], [X, 5, X], 1), _sample(G, [1, 9], [9, X], 0), _sample(G, [0, 1, 8, 7], [X, 8, 7, X], 1)],
        image_size=2,
        pad_to_multiple=4,
    )
    assert row.task is None
    assert row.tasks == (C, G)
    assert row.tokens.tolist() == [[1, 0, 5, 1, 9, 0, 1, 8, 7, 0, 0, 0]]
    assert row.labels.tolist() == [[X, 5, X, 9, X, X, 8, 7, X, X, X, X]]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5, 6]]
    assert row.boundaries == (0, 3, 5, 12)  # the padding belongs to the last sample
    assert row.token_tasks is not None
    assert row.token_tasks.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
    assert row.image_mask.nonzero()[:, 1].tolist() == [1, 5]
    assert row.image_tasks == (C, G)
    assert row.pixel_values[:, 0, 0, 0].tolist() == [3.0, 4.0]
    assert (row.num_content_tokens, row.num_supervised_tokens) == (9, 4)


def test_a_row_of_one_task_names_it() -> None:
    row = collate_packed([_sample(G, [1, 9], [9, X], 0)] * 2, image_size=2)
    assert (row.task, row.token_tasks, row.image_tasks) == (G, None, ())
    assert row.pixel_values.shape == (0, 3, 2, 2)


def _loader(folders: list[Path], packing: str, *, capacity: int = 16, num_rows: int = 2, **options: Any) -> TrainLoader:
    """Samples of 6 positions: two fit into 16."""
    config = RunConfig()
    config.model.template = "phi3_instruct"
    config.data.train, config.data.num_workers = [str(folder) for folder in folders], 0
    config.data.packing, config.data.pack_length = packing, capacity
    config.model.vocabulary.text_size, config.model.vq.num_codes, config.model.vq.num_indices = 400, 16, 4
    config.model.max_seq_length = capacity
    return build_loader(
        config,
        **{
            "tokenizer_hash": "abc",
            "num_image_tokens": 3,
            "image_size": 8,
            "dp_rank": 0,
            "dp_size": 1,
            "tasks": (C, G),
            "global_batch_size": num_rows,
            **options,
        },
    )


@pytest.mark.parametrize("packing", ["by_task", "mixed"])
def test_an_epoch_draws_every_sample_once(packing: str, tmp_path: Path, make_dataset: Make) -> None:
    folders = [make_dataset(tmp_path / "a", [C] * 6 + [G] * 4), make_dataset(tmp_path / "b", [C] * 2 + [G] * 4)]
    loader = _loader(folders, packing)
    assert (loader.steps_per_epoch, loader.epoch_size) == (4, 8)  # 16 samples, two in a row, two rows in a step
    rows = [batch for _ in range(4) for batch in loader.next_step()]
    assert Counter(sample for row in rows for sample in row.sample_ids) == Counter(
        [*(f"c{i}" for i in range(6)), *(f"g{i}" for i in range(6, 10)), "c0", "c1", "g2", "g3", "g4", "g5"]
    )
    assert all(row.boundaries == (0, 6, 12) for row in rows)
    assert any(row.task is None for row in rows) == (packing == "mixed")


def test_rows_are_dealt_to_ranks_and_resume(tmp_path: Path, make_dataset: Make) -> None:
    folder = make_dataset(tmp_path / "a", [C, G] * 9)
    whole = _loader([folder], "mixed")
    steps = [[row.sample_ids for row in whole.next_step()] for _ in range(8)]
    ranks = [_loader([folder], "mixed", dp_rank=rank, dp_size=2) for rank in range(2)]
    assert steps == [[rank.next_step()[0].sample_ids for rank in ranks] for _ in range(8)]
    first = _loader([folder], "mixed")
    first.next_step()
    second = _loader([folder], "mixed")
    second.load_state_dict(first.state_dict())
    assert [row.sample_ids for row in second.next_step()] == steps[1]


def test_other_packing_warns_on_resume(tmp_path: Path, make_dataset: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_dataset(tmp_path / "a", [C, G] * 9)
    _loader([folder], "by_task").load_state_dict(_loader([folder], "mixed").state_dict())
    assert "packing was mixed when the checkpoint was written and is by_task now" in caplog.text
    caplog.clear()
    longer = _loader([folder], "mixed", capacity=18)
    longer.load_state_dict(_loader([folder], "mixed").state_dict())
    assert "pack_length was 16 when the checkpoint was written and is 18 now" in caplog.text


def test_a_bad_sample_leaves_its_row_smaller_and_is_counted(tmp_path: Path, make_dataset: Make) -> None:
    loader = _loader([make_dataset(tmp_path / "a", [C] * 4, bad=[2])], "by_task", tasks=[C])
    rows = loader.next_step()
    assert sorted(sample for row in rows for sample in row.sample_ids) == ["c0", "c1", "c3"]
    assert loader.counts["skipped/unreadable_image"] == 1
    with pytest.raises(DataError, match="no usable sample in 1 packed rows .*unreadable_image"):
        _loader([make_dataset(tmp_path / "b", [C] * 2, bad=[0, 1])], "by_task", tasks=[C], num_rows=1).next_step()


def test_says_what_packing_saves(tmp_path: Path, make_dataset: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        _loader([make_dataset(tmp_path / "a", [C] * 8)], "by_task", tasks=[C], capacity=12)
    assert "8 samples of 6 tokens (median) in 4 rows of at most 12; rows are 100.0 % full" in caplog.text
    assert "would take 2.0 x the positions" in caplog.text
