"""Saves that fail, hang, are killed or find no room: every rank agrees, and what is complete stays so."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_hgpt.config import CheckpointConfig, ParallelConfig, TimeoutsConfig, TrainingConfig
from megatron_hgpt.errors import CheckpointError, ConfigError, HungError
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer
from tests import disks

TP2 = {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "phi3")


def make_trainer(backbone: Path, folder: Path, *, is_async: bool = False, save_s: float = 60.0, **fields: Any) -> Any:
    from megatron_hgpt import distributed

    layout = ParallelConfig(**fields.pop("parallel", TP2))
    context = distributed.initialize(layout, seed=1)
    training = TrainingConfig(
        stage="stage3_joint", num_steps=4, precision="fp32", micro_batch_size=2, global_batch_size=8
    )
    checkpoint = CheckpointConfig(**{"save_interval_steps": 1, "keep_last": 0, "async_save": is_async, **fields})
    timeouts = TimeoutsConfig(save_s=save_s)
    config = tiny_config(backbone, folder, parallel=layout, training=training, checkpoint=checkpoint, timeouts=timeouts)
    return build_trainer(config, context)


def save(trainer: Any, **fields: Any) -> None:
    trainer.checkpointer.save(
        trainer.models, trainer.engine, step=trainer.step, loader_state=trainer.loader.state_dict(), **fields
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """Warnings of the checkpointer, and what follows from them."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_hgpt.checkpoint")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def full(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")


FAULTS: dict[str, tuple[int, str, Any, str]] = {
    # rank, what is replaced, by what, what is said
    "disk full on rank 0": (0, "os.fsync", full, "rank 0: No space left on device, "),
    "disk full on rank 1": (1, "os.fsync", full, "rank 1: No space left on device, "),
    "another error on rank 0": (
        0,
        "megatron_hgpt.checkpoint.checkpointer.describe",
        mock.Mock(side_effect=ValueError("no idea")),
        "(rank 0: no idea)",
    ),
    "another error on rank 1": (
        1,
        "megatron_hgpt.checkpoint.writer.write_shard",
        mock.Mock(side_effect=KeyError("a name")),
        "(rank 1: 'a name')",
    ),
    "no memory on rank 1": (
        1,
        "megatron_hgpt.checkpoint.snapshot.HostCopies.take",
        mock.Mock(side_effect=RuntimeError("cannot allocate")),
        "(rank 1: no copy could be made (cannot allocate))",
    ),
}


def fail_to_save(backbone: Path, folder: Path, fault: str, is_async: bool) -> list[str]:
    """What this rank says: the error of a final save, or the warnings of one that training outlives."""
    trainer = make_trainer(backbone, folder, is_async=is_async)
    rank, name, fake, _ = FAULTS[fault]
    trainer.train_step()
    save(trainer)
    trainer.checkpointer.published(wait=True)
    trainer.train_step()
    broken = mock.patch(name, fake) if torch.distributed.get_rank() == rank else contextlib.nullcontext()
    with said() as lines, broken:
        try:
            save(trainer)
            assert trainer.checkpointer.published(wait=True) == []
        except CheckpointError as error:
            lines.append(f"error: {error}")
    trainer.train_step()
    save(trainer)
    trainer.checkpointer.published(is_final=True)
    return lines


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_save_is_known_on_every_rank(fault: str, is_async: bool, backbone: Path, tmp_path: Path) -> None:
    expected = FAULTS[fault][-1]
    for (line,) in run_ranks(fail_to_save, 2, backbone, tmp_path, fault, is_async, timeout_s=60):
        assert f"cannot write a checkpoint to {tmp_path / 'checkpoints'} (" in line
        assert "the newest complete one there is intact" in line
        assert line.startswith("error: ") != is_async
        assert ("Training goes on" if is_async else "Make room or mend the disk, and start again") in line
        # A warning is for the first rank's console; an error may be seen on any.
        assert expected in line or (is_async and "the first rank says why" in line)
    assert names(tmp_path / "checkpoints") == ["step_00000001", "step_00000003"]


def hang(backbone: Path, folder: Path, rank: int) -> tuple[list[str], float]:
    """An fsync that does not return on one rank: given up, trained on, saved again; the late thread does no harm."""
    trainer = make_trainer(backbone, folder, is_async=True, save_s=1.0)
    release, true_fsync = threading.Event(), os.fsync
    is_stuck = torch.distributed.get_rank() == rank
    trainer.train_step()
    started = time.monotonic()
    with said() as lines:
        with mock.patch.object(os, "fsync", lambda descriptor: release.wait(60) if is_stuck else None):
            save(trainer)
            trainer.train_step()
            while not lines:
                trainer.train_step()
                assert trainer.checkpointer.published() == []
        seconds = time.monotonic() - started
        step = trainer.step
        with mock.patch.object(os, "fsync", true_fsync):
            save(trainer)
            assert [one.path.name for one in trainer.checkpointer.published(wait=True)] == [f"step_{step:08d}"]
        release.set()
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint step_"):
                thread.join(20)
    torch.distributed.barrier()
    assert names(trainer.checkpointer.directory) == [f"step_{step:08d}"]
    return lines[:1], seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_hangs_is_given_up_while_training_goes_on(rank: int, backbone: Path, tmp_path: Path) -> None:
    (first, seconds), _ = run_ranks(hang, 2, backbone, tmp_path, rank, timeout_s=60)
    (line,) = first
    assert f"(rank {'0, 1' if rank == 0 else '1'} has not written within 1 s (timeouts.save_s))" in line or (
        rank == 0 and "(rank 0 has not written within 1 s (timeouts.save_s))" in line
    )
    assert "Training goes on; the next save tries anew" in line
    assert seconds < 15


def hang_at_the_end(backbone: Path, folder: Path) -> str:
    trainer = make_trainer(backbone, folder, is_async=True, save_s=1.0)
    trainer.train_step()
    if torch.distributed.get_rank() == 1:
        mock.patch.object(os, "fsync", lambda _: time.sleep(3600)).start()
    save(trainer)
    with pytest.raises(HungError) as error:
        trainer.checkpointer.published(is_final=True)
    return str(error.value)


def test_a_last_save_that_hangs_is_an_error_and_the_process_ends(backbone: Path, tmp_path: Path) -> None:
    for message in run_ranks(hang_at_the_end, 2, backbone, tmp_path, timeout_s=60):
        assert "rank 1 has not written within 1 s" in message


def apart(backbone: Path, folder: Path) -> str:
    trainer = make_trainer(backbone, folder)
    if torch.distributed.get_rank() == 1:
        trainer.checkpointer.directory = folder / "of another machine"
    with mock.patch("megatron_hgpt.checkpoint.writer._UNSEEN_S", 0.5), pytest.raises(CheckpointError) as error:
        save(trainer)
    return str(error.value)


def test_a_disk_that_one_machine_does_not_see_is_named(backbone: Path, tmp_path: Path) -> None:
    for message in run_ranks(apart, 2, backbone, tmp_path, timeout_s=60):
        assert "(rank 1: " in message and "is not seen on " in message and "need a disk that all share" in message


def be_killed(backbone: Path, folder: Path, when: str) -> None:
    """Every rank is killed in a save, before or after the folder is described."""
    trainer = make_trainer(backbone, folder, is_async=True)
    trainer.train_step()
    save(trainer)
    trainer.checkpointer.published(wait=True)
    trainer.train_step()
    pids: list[Any] = [None, None]
    torch.distributed.all_gather_object(pids, os.getpid())

    def kill_all(*_: Any, **__: Any) -> None:
        for pid in sorted(pids, key=lambda one: one == os.getpid()):  # itself last
            os.kill(pid, signal.SIGKILL)

    with mock.patch(f"megatron_hgpt.checkpoint.{when}", kill_all):
        save(trainer)
        while True:
            trainer.checkpointer.published(wait=True)


def go_on(backbone: Path, folder: Path) -> tuple[list[str], int]:
    with said() as lines:
        trainer = make_trainer(backbone, folder)
        trainer.fit()
    return lines, trainer.step


@pytest.mark.parametrize("when", ["shards.sync_folder", "checkpointer.describe", "checkpointer.give_name"])
def test_killed_in_a_save(when: str, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died with exit code -9"):
        run_ranks(be_killed, 2, backbone, tmp_path, when)
    checkpoints = tmp_path / "checkpoints"
    assert names(checkpoints) == ["step_00000001", "step_00000002.2.tmp"]
    (lines, step), _ = run_ranks(go_on, 2, backbone, tmp_path)
    assert lines == [f"removing {checkpoints / 'step_00000002.2.tmp'}, which an interrupted save left unfinished"]
    assert step == 4
    assert names(checkpoints) == [f"step_0000000{number}" for number in range(1, 5)]


def save_in_shares(backbone: Path, folder: Path) -> tuple[int, dict[str, int]]:
    """Bytes of this rank's snapshot and of each file, of a save in whose making no rank asks another for anything."""
    trainer = make_trainer(backbone, folder, is_async=True, parallel={"use_distributed_optimizer": True})
    trainer.train_step()
    collectives = ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast", "barrier")
    with contextlib.ExitStack() as stack:
        for name in collectives:
            stack.enter_context(mock.patch.object(torch.distributed, name, side_effect=AssertionError(name)))
        save(trainer)
    (saved,) = trainer.checkpointer.published(wait=True)
    info = json.loads((saved.path / "healthgpt.json").read_text())
    return trainer.checkpointer._copies.num_bytes, {name: one["bytes"] for name, one in info["files"].items()}


def test_each_rank_of_zero_1_writes_its_own_half(backbone: Path, tmp_path: Path) -> None:
    (first, files), (second, _) = run_ranks(save_in_shares, 2, backbone, tmp_path)
    assert abs(first - second) < 0.1 * first
    assert abs(files["__0_0.distcp"] - files["__1_0.distcp"]) < 0.1 * files["__0_0.distcp"]
    assert first < files["__0_0.distcp"], "the snapshot holds no more than what its rank writes"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    with disks.small_disk(tmp_path / "disk", "3m") as disk:
        yield disk


def fill(backbone: Path, folder: Path, disk: Path, fillers: tuple[int, int]) -> tuple[list[str], list[str]]:
    """Train beside a disk that gets so full before the start, and so much fuller before the second save."""
    trainer = make_trainer(backbone, folder, directory=str(disk / "checkpoints"))
    before, later = fillers
    if torch.distributed.get_rank() == 0:
        (disk / "before").write_bytes(bytes(before))
    torch.distributed.barrier()
    with said() as lines:
        try:
            trainer.checkpointer.prepare(trainer.models, trainer.engine)
            trainer.train_step()
            save(trainer)
            if torch.distributed.get_rank() == 0:
                (disk / "later").write_bytes(bytes(later))
            trainer.train_step()
            save(trainer)
        except (CheckpointError, ConfigError) as error:
            lines.append(f"{type(error).__name__}: {error}")
    torch.distributed.barrier()
    directory = disk / "checkpoints"
    return lines, names(directory)


def test_a_disk_without_room_for_one_checkpoint_is_told_before_training(
    backbone: Path, small_disk: Path, tmp_path: Path
) -> None:
    for (line,), left in run_ranks(fill, 2, backbone, tmp_path, small_disk, (2_500_000, 0)):
        assert line.startswith(f"ConfigError: checkpoint.directory: no checkpoint can be written to {small_disk}")
        assert "(one takes 1.3 MB, and 0.6 MB are free there)" in line
        assert left == []


def test_a_disk_that_fills_up_keeps_what_is_complete(backbone: Path, small_disk: Path, tmp_path: Path) -> None:
    for (line,), left in run_ranks(fill, 2, backbone, tmp_path, small_disk, (0, 1_000_000)):
        assert line.startswith(
            f"CheckpointError: cannot write a checkpoint to {small_disk / 'checkpoints'} (rank 0: one takes"
        )
        assert "the newest complete one there is intact" in line
        assert left == ["step_00000001"]


def test_a_disk_that_cannot_be_written_is_told_before_training(
    backbone: Path, small_disk: Path, tmp_path: Path
) -> None:
    (small_disk / "checkpoints").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    (message,) = run_ranks(prepare_only, 1, backbone, tmp_path, small_disk)
    assert "(Read-only file system); make room there, or name another disk" in message


def prepare_only(backbone: Path, folder: Path, disk: Path) -> str:
    trainer = make_trainer(backbone, folder, parallel={}, directory=str(disk / "checkpoints"))
    with pytest.raises(ConfigError) as error:
        trainer.checkpointer.prepare(trainer.models, trainer.engine)
    return str(error.value)
