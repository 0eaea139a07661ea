"""A few tries of the drill suite, with a fixed seed; `make drills` has them all. And that its judgement can fail."""

from __future__ import annotations

import platform
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.drills.kinds import (
    KINDS,
    DiskFull,
    Hang,
    KillInSave,
    KillRank,
    OutputFull,
    Terminate,
    TerminateSlurm,
    TerminateTorchrun,
    can_mount,
)  # fmt: skip
from tests.drills.nodes import LostNode, ShrunkRun, can_make_namespaces
from tests.drills.processes import LAYOUTS, Run
from tests.drills.sequence import Drill, Try, World, last_step
from tests.drills.table import failures, heading, table
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
    if issubclass(kind, DiskFull) and not can_mount(world.folder / "mount"):
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


@pytest.mark.slow
def test_a_job_that_slurm_preempts_is_saved_and_ends_with_143(world: World) -> None:
    for save in ("sync", "async"):
        (attempt,) = TerminateSlurm(world, LAYOUTS["tp2"], save, random.Random(SEED + 2)).play(1)
        assert failures([attempt]) == []
        assert not attempt.in_start and attempt.status == 143 and attempt.steps_lost == 0


def judged(kind: type[Drill], log: str = "", **fields: Any) -> Try:
    """What a kind says of a try that went on from its newest checkpoint, step 10."""
    drill = object.__new__(kind)
    drill.run = SimpleNamespace(begun_at=lambda: 10, text=lambda: log, requeues=lambda: log.count("requeued"))  # type: ignore[assignment]
    attempt = Try(kind=kind.name, layout="tp2", save="sync", **{"steps_lost": 0, **fields})
    drill.check(attempt, newest=10)
    return attempt


HANG = {"is_unattended": True, "named_s": 2.0, "ended_s": 5.0}


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (KillRank, {"is_unattended": True}, [{"is_unattended": False}]),
        (LostNode, {"is_unattended": True}, [{"is_unattended": False}]),
        (ShrunkRun, {"is_unattended": True}, [{"is_unattended": False}]),
        (Hang, {**HANG, "log": "rank 1 ended with exit status 75"}, [
            HANG, {**HANG, "log": "exit status 75", "is_unattended": False}, {**HANG, "log": "exit status 1"},
            {**HANG, "log": "exit status 75", "named_s": None}, {**HANG, "log": "exit status 75", "ended_s": None},
        ]),
        (Hang, {**HANG, "log": "rank 1 was killed by SIGKILL"}, []),
        (Terminate, {"status": 143}, [
            {"status": 1}, {"status": 0}, {"status": None}, {"status": 143, "steps_lost": 1},
            {"status": 1, "in_start": True},
        ]),
        (TerminateTorchrun, {"status": 1}, [{"status": 143}, {"status": 0}]),
        (TerminateTorchrun, {"status": 143, "in_start": True}, []),
        (TerminateSlurm, {"status": 143}, [{"status": 1}, {"status": 143, "log": "requeued"}]),
        (DiskFull, {"status": 2}, [
            {"status": 0}, {"status": 1}, {"status": 2, "notes": ["not said: x"]},
            {"status": 2, "notes": ["traceback"]},
        ]),
        (OutputFull, {"status": 2}, [{"status": 1}, {"status": 2, "notes": ["not said: x"]}]),
    ],
)  # fmt: skip
def test_what_a_kind_asks_of_a_try(kind: type[Drill], good: dict[str, Any], bad: list[dict[str, Any]]) -> None:
    assert judged(kind, **good).survived
    for fields in bad:
        assert not judged(kind, **fields).survived, fields


def test_a_table_says_where_it_comes_from() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d, seed 9, commit \S+, \S+ \S+, \d+ cores", heading(9))
    assert platform.node() not in heading(9)


def test_a_start_after_a_requeue_is_told_so(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tmp_path / "run.yaml", (), "slurm")
    assert run.environment_of_way()["SLURM_RESTART_COUNT"] == "0"
    subprocess.run([run.folder / "slurm" / "scontrol", "requeue", "17"], check=False)
    assert run.environment_of_way()["SLURM_RESTART_COUNT"] == "1"


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
