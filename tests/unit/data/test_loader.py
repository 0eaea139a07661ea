"""Order and content of the steps: the same for every layout, resumable, every sample once per epoch."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.config import RunConfig
from megatron_hgpt.data.loader import TaskSchedule, TrainLoader, build_loader
from megatron_hgpt.errors import ConfigError, DataError, HungError
from megatron_hgpt.samples import Task

C, G = Task.COMPREHENSION, Task.GENERATION
Make = Callable[..., Path]


def _config(train: Sequence[Path] = (), validation: Sequence[Path] = (), **changes: Any) -> RunConfig:
    config = RunConfig()
    config.model.template = "phi3_instruct"
    config.data.train, config.data.validation = [str(path) for path in train], [str(path) for path in validation]
    config.data.num_workers = changes.pop("num_workers", 0)
    config.data.mixture = changes.pop("mixture", {})
    config.data.shuffle = changes.pop("shuffle", True)
    config.model.vocabulary.text_size, config.model.vq.num_codes, config.model.vq.num_indices = 400, 16, 4
    config.training.micro_batch_size = changes.pop("micro_batch_size", 2)
    assert not changes
    return config


def _loader(
    config: RunConfig,
    *,
    tasks: Sequence[Task] = (C, G),
    global_batch_size: int = 8,
    dp_rank: int = 0,
    dp_size: int = 1,
    pad: int = 1,
) -> TrainLoader:
    return build_loader(
        config,
        tokenizer_hash="abc",
        num_image_tokens=3,
        image_size=8,
        dp_rank=dp_rank,
        dp_size=dp_size,
        tasks=tasks,
        global_batch_size=global_batch_size,
        pad_to_multiple=pad,
    )


def _steps(loader: TrainLoader, number: int) -> list[list[tuple[str, ...]]]:
    return [[tuple(batch.sample_ids) for batch in loader.next_step()] for _ in range(number)]


@pytest.fixture
def mixed(tmp_path: Path, make_dataset: Make) -> list[Path]:
    """12 comprehension and 8 generation samples in two folders (ids repeat across folders only by task)."""
    return [make_dataset(tmp_path / "a", [C, G] * 5), make_dataset(tmp_path / "b", [C] * 10 + [G] * 6)]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_step_is_the_same_for_every_data_parallel_size(mixed: list[Path], num_workers: int) -> None:
    whole = _steps(_loader(_config(mixed)), 9)
    for dp_size in (2, 4):
        ranks = [
            _loader(_config(mixed, num_workers=num_workers), dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)
        ]
        parts = [_steps(loader, 9) for loader in ranks]
        for loader in ranks:
            loader.close()
        for step, expected in enumerate(whole):
            merged = [parts[i % dp_size][step][i // dp_size] for i in range(len(expected))]
            assert merged == expected


def test_each_epoch_draws_every_sample_once_in_another_order(tmp_path: Path, make_dataset: Make) -> None:
    config = _config([make_dataset(tmp_path / "a", [C] * 12 + [G] * 4)])
    loader = _loader(config)  # 8 micro-batches of 2 an epoch, 4 a step
    assert loader.steps_per_epoch == 2
    assert loader.num_samples == {C: 12, G: 4}
    epochs = [[ids for step in _steps(loader, 2) for ids in step] for _ in range(2)]
    expected = sorted([*(f"c{i}" for i in range(12)), *(f"g{i}" for i in range(12, 16))])
    for epoch in epochs:
        assert sorted(sample for ids in epoch for sample in ids) == expected
        assert all(len({sample[0] for sample in ids}) == 1 for ids in epoch)  # one task each
    assert epochs[0] != epochs[1]
    config.training.seed += 1
    assert [ids for step in _steps(_loader(config), 2) for ids in step] != epochs[0]


def test_last_micro_batch_wraps_around(tmp_path: Path, make_dataset: Make) -> None:
    config = _config([make_dataset(tmp_path / "a", [C] * 5)], shuffle=False)
    loader = _loader(config, tasks=[C], global_batch_size=2)
    assert (loader.steps_per_epoch, loader.epoch_size) == (3, 5)
    drawn = [ids for step in _steps(loader, 4) for ids in step]
    assert drawn == [("c0", "c1"), ("c2", "c3"), ("c4", "c0"), ("c0", "c1")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_continues_where_it_stopped(mixed: list[Path], num_workers: int) -> None:
    reference = _steps(_loader(_config(mixed)), 7)
    first = _loader(_config(mixed, num_workers=num_workers))
    assert _steps(first, 3) == reference[:3]
    state = first.state_dict()
    first.close()
    second = _loader(_config(mixed, num_workers=num_workers))
    second.next_step()  # has a step ahead in the making, which must not be used
    second.load_state_dict(state)
    assert _steps(second, 4) == reference[3:]
    second.close()


def test_resume_with_other_data_warns(mixed: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    state = _loader(_config(mixed)).state_dict()
    smaller = _loader(_config(mixed[:1]))
    smaller.load_state_dict(state)
    assert "num_samples was 26 when the checkpoint was written and is 10 now" in caplog.text


def test_resume_at_the_same_says_nothing(mixed: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint keeps the state as JSON."""
    settings = {"mixture": {"comprehension": 1, "generation": 3}}
    state = json.loads(json.dumps(_loader(_config(mixed, **settings)).state_dict()))
    _loader(_config(mixed, **settings)).load_state_dict(state)
    earlier = {"step": 3}  # of a version that did not keep the rest
    _loader(_config(mixed)).load_state_dict(earlier)
    assert not caplog.text


@pytest.mark.parametrize(
    ("setting", "changed", "said"),
    [
        ("mixture", {"comprehension": 3, "generation": 1}, "data order: mixture was {'comprehension': 1"),
        ("shuffle", False, "data order: shuffle was True when the checkpoint was written and is False now"),
    ],
)
def test_resume_with_another_order_warns(
    setting: str, changed: Any, said: str, mixed: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    before = {"mixture": {"comprehension": 1, "generation": 1}, "shuffle": True}
    state = _loader(_config(mixed, **before)).state_dict()
    _loader(_config(mixed, **before | {setting: changed})).load_state_dict(state)
    assert said in caplog.text


def test_resume_with_as_many_other_samples_warns(
    tmp_path: Path, make_dataset: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Sizes alike, content not: the digest of the manifest tells."""
    state = _loader(_config([make_dataset(tmp_path / "a", [C] * 5 + [G] * 5)])).state_dict()
    other = make_dataset(tmp_path / "b", [G] * 5 + [C] * 5)
    _loader(_config([other])).load_state_dict(state)
    assert "data order: datasets was [" in caplog.text
    assert "num_samples" not in caplog.text


def test_a_stage_of_one_task_draws_no_other(mixed: list[Path]) -> None:
    loader = _loader(_config(mixed), tasks=[G], global_batch_size=2)
    assert {ids[0][0] for step in _steps(loader, 20) for ids in step} == {"g"}


def test_mixture_sets_the_shares(mixed: list[Path]) -> None:
    loader = _loader(_config(mixed, mixture={"comprehension": 1, "generation": 3}))
    tasks = Counter(batch.task for _ in range(10) for batch in loader.next_step())
    assert tasks == {C: 10, G: 30}
    only = _loader(_config(mixed, mixture={"comprehension": 0, "generation": 3}))
    assert {batch.task for _ in range(3) for batch in only.next_step()} == {G}


def test_schedule_is_even_and_exact() -> None:
    schedule = TaskSchedule({C: Fraction(3), G: Fraction(2)})
    drawn = [schedule(i) for i in range(50)]
    for start in range(0, 50, 5):
        assert Counter(task for task, _ in drawn[start : start + 5]) == {C: 3, G: 2}
    for task in (C, G):
        assert [ordinal for kind, ordinal in drawn if kind is task] == list(range(30 if task is C else 20))
    assert schedule(10**12)[1] == 3 * 10**12 // 5  # no drift, no walk


def test_batches_for_sequence_parallelism(mixed: list[Path]) -> None:
    (batch, *_) = _loader(_config(mixed), pad=4).next_step()
    assert batch.tokens.shape == (2, 8)  # 6 positions rounded up
    assert batch.num_content_tokens == 12
    assert batch.pixel_values.shape == (2, 3, 8, 8)
    assert batch.num_supervised_tokens == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_sample_is_replaced_and_counted(tmp_path: Path, make_dataset: Make, num_workers: int) -> None:
    folder = make_dataset(tmp_path / "a", [C] * 6, bad=[1, 2])
    loader = _loader(_config([folder], shuffle=False, num_workers=num_workers), tasks=[C], global_batch_size=2)
    assert _steps(loader, 3) == [[("c0", "c3")], [("c3", "c3")], [("c4", "c5")]]
    assert loader.counts["skipped/unreadable_image"] == 3
    assert loader.counts["truncated"] == 0
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_only_bad_samples_stop_the_run(tmp_path: Path, make_dataset: Make, num_workers: int) -> None:
    folder = make_dataset(tmp_path / "a", [C] * 3, bad=[0, 1, 2])
    loader = _loader(_config([folder], num_workers=num_workers), tasks=[C], global_batch_size=2)
    with pytest.raises(DataError, match="3 samples in a row cannot be used .*unreadable_image.* check the dataset"):
        loader.next_step()
    loader.close()


def test_truncated_samples_are_counted(mixed: list[Path]) -> None:
    config = _config(mixed)
    config.model.max_seq_length = 5
    loader = _loader(config)
    loader.next_step()
    assert loader.counts["truncated"] == 8
    config.model.max_seq_length = 4  # an image and nothing to learn
    with pytest.raises(DataError, match="no_supervised_token"):
        _loader(config).next_step()


def test_refusals(mixed: list[Path], tmp_path: Path, make_dataset: Make) -> None:
    with pytest.raises(DataError, match=r"data\.train names no dataset folder"):
        _loader(_config())
    with pytest.raises(DataError, match="no generation sample, which the stage trains"):
        _loader(_config([make_dataset(tmp_path / "c", [C])]))
    with pytest.raises(ConfigError, match="global_batch_size 6 is not a multiple of micro_batch_size 2 x data"):
        _loader(_config(mixed), global_batch_size=6, dp_size=2)
    for mixture, message in (
        ({"vqa": 1.0}, "data.mixture vqa: 1.0; give comprehension or generation"),
        ({"comprehension": -1.0}, "give comprehension or generation a weight of 0 or more"),
        ({"comprehension": 1.0}, "no weight for generation"),
        ({"comprehension": 0, "generation": 0}, "weight 0 to all"),
    ):
        with pytest.raises(ConfigError, match=message):
            _loader(_config(mixed, mixture=mixture))


def test_samples_that_do_not_come_end_the_wait(mixed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config, arrived = _config(mixed, num_workers=2), threading.Event()
    config.timeouts.loader_s = 0.2
    loader, build = _loader(config), TrainLoader._build
    monkeypatch.setattr(TrainLoader, "_build", lambda self, index: arrived.wait(60) and build(self, index))
    try:
        with pytest.raises(
            HungError, match=r"the samples of step 1 were not there after 0\.2 s \(timeouts\.loader_s\)"
        ):
            loader.next_step()
    finally:
        arrived.set()
        loader.close()
