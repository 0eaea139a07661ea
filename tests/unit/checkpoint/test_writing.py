"""Rectangles, shares, snapshots and the names of folders: the parts of a save that need no other process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from megatron_hgpt.checkpoint import publication
from megatron_hgpt.checkpoint.description import checkpoint_folders
from megatron_hgpt.checkpoint.publication import give_name, next_publication, prune, settle_leftovers
from megatron_hgpt.checkpoint.shards import Shard, write_metadata, write_shard
from megatron_hgpt.checkpoint.snapshot import HostCopies, share_of
from megatron_hgpt.checkpoint.state import Chunk, rectangles
from megatron_hgpt.files import sealed


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 6), (4, 1, 3)])
def test_any_range_is_a_few_boxes_that_hold_its_elements_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for stop in range(start, numbers.numel() + 1):
            boxes = list(rectangles(shape, start, stop))
            assert len(boxes) <= 2 * len(shape) - 1
            found = [
                numbers[tuple(slice(a, a + n) for a, n in zip(corner, box, strict=True))].flatten()
                for corner, box in boxes
            ]
            assert torch.cat([torch.arange(0), *found]).tolist() == list(range(start, stop))


def chunk(key: str, values: torch.Tensor, **fields: Any) -> Chunk:
    return Chunk(key=key, global_shape=tuple(values.shape), offset=(0,) * values.ndim, tensor=values, **fields)


def test_what_all_hold_is_written_once_and_dealt_out_by_bytes() -> None:
    shared = [chunk(f"shared {size}", torch.zeros(size), is_shared=True) for size in (9, 7, 6, 5, 4, 3, 2)]
    elsewhere = chunk("of another tensor rank", torch.zeros(100), is_shared=True, is_first_copy=False)
    shares = [
        share_of([chunk(f"own {rank}", torch.zeros(1)), elsewhere, *(shared if rank else shared[::-1])], rank, 3)
        for rank in range(3)
    ]
    keys = sorted(one.key for share in shares for one in share)
    assert keys == sorted([*(one.key for one in shared), "own 0", "own 1", "own 2"])
    loads = [sum(one.num_bytes for one in share) for share in shares]
    assert max(loads) - min(loads) <= 4 * 2


def test_a_snapshot_keeps_its_values_and_its_memory() -> None:
    values, copies = torch.arange(6.0).view(2, 3), HostCopies()
    (first,) = copies.take([chunk("a", values)])
    values += 1
    assert first.tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    (second,) = copies.take([chunk("a", values)])
    assert second.tensor.data_ptr() == first.tensor.data_ptr() and second.tensor.equal(values)
    assert copies.num_bytes == 24


def test_torch_s_own_reader_reads_what_is_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    parts = [
        Chunk(key="a", global_shape=(3, 4), offset=(0, 0), tensor=whole[:1].clone()),
        Chunk(key="a", global_shape=(3, 4), offset=(1, 0), tensor=whole[1:].clone()),
    ]
    shards = [write_shard(tmp_path, rank, [part], lambda: None) for rank, part in enumerate(parts)]
    shards = [Shard.from_json(json.loads(json.dumps(shard.to_json()))) for shard in shards]
    write_metadata(tmp_path, shards)
    target = {"a": torch.zeros(3, 4)}
    load(target, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert target["a"].equal(whole)
    assert str(tmp_path).encode() not in (tmp_path / ".metadata").read_bytes(), "no path of this machine"


@pytest.mark.parametrize(("rows", "problem"), [((0, 1), "invalid fill"), ((0, 2, 1, 3), "overlapping")])
def test_parts_that_do_not_make_whole_tensors_are_refused(rows: tuple[int, ...], problem: str, tmp_path: Path) -> None:
    bounds = list(zip(rows[::2], rows[1::2], strict=True))
    parts = [
        Chunk(key="a", global_shape=(3, 4), offset=(start, 0), tensor=torch.zeros(stop - start, 4))
        for start, stop in bounds
    ]
    shards = [write_shard(tmp_path, rank, [part], lambda: None) for rank, part in enumerate(parts)]
    shards.append(write_shard(tmp_path, 9, [chunk("b", torch.zeros(2))], lambda: None))
    with pytest.raises(ValueError, match=problem):
        write_metadata(tmp_path, shards)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def filled(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(content)
    return folder


def test_a_folder_of_the_same_step_makes_way(tmp_path: Path) -> None:
    final = filled(tmp_path / "step_00000004", "old")
    give_name(filled(tmp_path / "step_00000004.1.tmp", "new"), final)
    assert (final / "file").read_text() == "new" and names(tmp_path) == ["step_00000004"]


def test_a_rename_that_fails_leaves_the_folder_that_is_there(tmp_path: Path) -> None:
    final = filled(tmp_path / "step_00000004", "old")
    with pytest.raises(OSError, match="No such file"):
        give_name(tmp_path / "step_00000004.1.tmp", final)
    assert (final / "file").read_text() == "old" and names(tmp_path) == ["step_00000004"]


def test_killed_between_the_renames(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    final = filled(tmp_path / "step_00000004", "old")
    with mock.patch.object(publication.shutil, "rmtree"), mock.patch.object(Path, "rename", lambda *_: None):
        give_name(filled(tmp_path / "step_00000004.1.tmp", "new"), final)
    final.rename(tmp_path / "step_00000004.old")
    filled(tmp_path / "step_00000002.pruned.tmp", "half removed")
    filled(tmp_path / "step_00000003.tmp", "of an earlier version")
    filled(tmp_path / "step_of_mine.tmp", "not ours")
    settle_leftovers(tmp_path)
    assert names(tmp_path) == ["step_00000004", "step_of_mine.tmp"]
    assert (final / "file").read_text() == "old"
    assert f"{final} is back" in caplog.text and "step_00000003.tmp, which an interrupted save" in caplog.text


def test_what_made_way_goes_where_the_new_one_has_its_name(tmp_path: Path) -> None:
    filled(tmp_path / "step_00000004", "new")
    filled(tmp_path / "step_00000004.old", "old")
    settle_leftovers(tmp_path)
    assert names(tmp_path) == ["step_00000004"] and (tmp_path / "step_00000004" / "file").read_text() == "new"


def checkpoint(directory: Path, step: int, number: int, *, is_healthy: bool = True) -> Path:
    folder = directory / f"step_{step:08d}"
    folder.mkdir()
    info = {
        "format_version": 3, "stage": "stage2", "step": step, "is_healthy": is_healthy, "trained_groups": [],
        "optimizer_steps": {}, "loader": {"step": step}, "rng_layout": [1, 1, 1], "fingerprint": {}, "base": {},
        "files": {name: {"bytes": 1, "sha256": "0"} for name in (".metadata", "resolved_config.yaml")},
        "publication": number,
    }  # fmt: skip
    (folder / "healthgpt.json").write_text(json.dumps(sealed(info)))
    return folder


def test_what_was_published_last_is_newest_and_stays(tmp_path: Path) -> None:
    """A run that went back from step 8 to 4: its step 5 counts, and not the steps it left behind."""
    for number, step in enumerate((4, 6, 8, 5), start=1):
        checkpoint(tmp_path, step, number)
    assert [path.name[-1] for path in checkpoint_folders(tmp_path)] == ["4", "6", "8", "5"]
    assert next_publication(tmp_path) == 5
    prune(tmp_path, 1)
    assert names(tmp_path) == ["step_00000005"]


def test_the_newest_healthy_one_is_never_removed(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, 1)
    checkpoint(tmp_path, 2, 2)
    for step in (3, 4, 5):
        checkpoint(tmp_path, step, step, is_healthy=False)
    (tmp_path / "step_00000009").mkdir()  # damaged, or not seen at the moment: not for us to remove
    prune(tmp_path, 0)
    assert len(names(tmp_path)) == 6
    prune(tmp_path, 2)
    assert names(tmp_path) == ["step_00000002", "step_00000004", "step_00000005", "step_00000009"]


def test_what_has_its_name_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mock.patch.object(publication, "sync_folder", side_effect=OSError(5, "Input/output error")):
        give_name(filled(tmp_path / "step_00000004.1.tmp", "new"), tmp_path / "step_00000004")
    assert names(tmp_path) == ["step_00000004"] and "may not outlast a loss of power" in caplog.text


def test_a_removal_that_is_interrupted_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, 1)
    checkpoint(tmp_path, 2, 2)
    with (
        mock.patch.object(publication.shutil, "rmtree", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        prune(tmp_path, 1)
    assert names(tmp_path) == ["step_00000001.pruned.tmp", "step_00000002"]
