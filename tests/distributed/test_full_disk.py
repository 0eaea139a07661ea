"""A run whose output_dir is full: refused at the start alike on every rank."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hgpt.config import ParallelConfig, RunConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.ownership import FolderOwner
from megatron_hgpt.run_stage import _own_folders
from megatron_hgpt.testing.distributed import run_ranks
from tests.disks import small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB without a free byte."""
    with small_disk(tmp_path / "small", "64k") as place:
        (place / "run").mkdir()
        (place / "ballast").write_bytes(bytes(shutil.disk_usage(place).free))
        yield place


def own(output_dir: Path) -> str:
    from megatron_hgpt import distributed

    context = distributed.initialize(ParallelConfig(), seed=1)
    try:
        with contextlib.ExitStack() as owned:
            _own_folders(RunConfig(output_dir=str(output_dir)), context, owned)
    except ConfigError as error:
        return str(error)
    return "owned"


def test_a_full_disk_is_refused_alike_on_every_rank(disk: Path) -> None:
    said = run_ranks(own, 2, disk / "run")
    reason = "cannot be written (No space left on device); make room, or name another place"
    assert said == [f"output_dir={disk / 'run'} {reason}"] * 2
    assert list((disk / "run").iterdir()) == [], "no lock of a run that never was"


def test_a_lock_that_cannot_be_written_is_not_left(disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"), FolderOwner(disk / "run"):
        pass
    assert list((disk / "run").iterdir()) == []
    (disk / "ballast").unlink()
    with FolderOwner(disk / "run") as owner:
        assert owner.path.read_text().startswith("{")
