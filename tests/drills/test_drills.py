"""A few tries of the drill suite, with a fixed seed; `make drills` has them all. And that its judgement can fail."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.drills.kinds import KINDS, DiskFull, KillInSave, KillRank, can_mount
from tests.drills.nodes import LostNode, ShrunkRun, can_make_namespaces
from tests.drills.processes import LAYOUTS
from tests.drills.sequence import Drill, Try, World, last_step
from tests.drills.table import failures, table
from tests.drills.weights import digest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
SEED = 9


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("drills"), num_steps=60)


def survives(kind: type[Drill], layout: str, save: str, world: World, tries: int = 1) -> None:
    attempts = kind(world, LAYOUTS[layout], save, random.Random(SEED)).play(tries)
    assert len(attempts) == tries
    assert failures(attempts) == []


@pytest.mark.parametrize(("kind", "save"), [(KillRank, "async"), (KillInSave, "sync")], ids=lambda value: str(value))
def test_a_killed_run_loses_nothing(kind: type[Drill], save: str, world: World) -> None:
    survives(kind, "dp2", save, world)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("save", ["sync", "async"])
def test_every_kind_of_drill(kind: type[Drill], save: str, world: World) -> None:
    if kind is DiskFull and not can_mount(world.folder / "mount"):
        pytest.skip("a tmpfs cannot be mounted here")
    survives(kind, "tp2", save, world)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LostNode, ShrunkRun])
def test_a_lost_node_needs_no_hand(kind: type[Drill], world: World) -> None:
    if not can_make_namespaces():
        pytest.skip("network namespaces cannot be made here")
    survives(kind, "dp2", "async", world)


def test_what_is_bad_is_a_failure() -> None:
    good = Try(kind="SIGKILL all", layout="tp2", save="sync", survived=True, steps_lost=3, steps_since_save=3)
    good.is_equal = True
    assert failures([good]) == []
    for field, value in (
        ("survived", False), ("is_equal", False), ("orphans", 1), ("leftovers", ["x.tmp"]), ("steps_lost", 4),
    ):  # fmt: skip
        bad = Try(**{**{name: getattr(good, name) for name in Try.__slots__}, field: value})
        assert len(failures([bad])) == 1, field
    assert "| 2 | 1 |" in table([good, Try(kind="SIGKILL all", layout="tp2", save="sync")], lambda a: (a.kind, "all"))


def test_one_bit_makes_another_digest(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-23)):
        dcp.save({"w": torch.tensor([0.5, value])}, checkpoint_id=tmp_path / name, no_dist=True)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


@pytest.mark.parametrize(
    ("before", "late", "step"),
    [
        ("step 1/9: loss\nstep 2/9: loss\n", "step 3/9: loss\nresumed from x: 0 of\nstep 1/9: loss", 3),
        ("step 7/9: loss\nresumed from x: 4 of 9\nstep 5/9: loss\n", "", 5),
        ("step 7/9: loss\nresumed from x: 4 of 9\n", "step 5/9: loss\n", None),
        ("step 7/9: loss\n", "step 1/9: loss\nstep 2/9: loss\n", 7),
    ],
)
def test_the_last_step_of_the_attempt_that_was_struck(before: str, late: str, step: int | None) -> None:
    assert last_step(before, late) == step
