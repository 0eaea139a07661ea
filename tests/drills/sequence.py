"""A drill: one run that is struck several times, goes on each time, and ends as one does that is left alone."""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from tests.drills.assets import write_assets
from tests.drills.processes import RESUMED, STEP, Layout, Run, TimeIsUpError, wait_for
from tests.drills.weights import digest

SAVE_EVERY = 10
START_S, END_S, ORPHAN_S = 180.0, 90.0, 5.0
"""Seconds at most from a start to its first step, from a signal to the end, and from a death to that of all others."""
QUICK = ("launch.restart_backoff_s=0.2", "launch.max_restarts=10")  # strikes follow each other without progress


@dataclasses.dataclass(kw_only=True, slots=True)
class Try:
    """What became of one strike."""

    kind: str
    layout: str
    save: str
    survived: bool = False
    """Training went on, from the newest complete checkpoint (or what the kind says)."""
    is_unattended: bool = False
    """It went on without a second start from outside."""
    steps_lost: int | None = None
    steps_since_save: int | None = None
    """Between the newest complete checkpoint and the strike: more must not be lost."""
    seconds_lost: float | None = None
    """From the strike until training went on, and the time of the lost steps."""
    named_s: float | None = None
    """From the strike until the console named the rank."""
    ended_s: float | None = None
    """From the strike until the struck processes were gone."""
    status: int | None = None
    """The launcher's, where it ended."""
    orphans: int = 0
    leftovers: list[str] = dataclasses.field(default_factory=list)
    is_equal: bool | None = None
    """Whether the run ended with the bits of an uninterrupted one; None where that is not to be expected."""
    in_start: bool = False
    """The strike fell before the first step of its start."""
    notes: list[str] = dataclasses.field(default_factory=list)

    def require(self, is_so: bool, otherwise: str) -> None:
        """Not survived, and why, unless it is so."""
        if not is_so:
            self.survived = False
            self.notes.append(otherwise)


@dataclasses.dataclass(kw_only=True, slots=True)
class Reference:
    """A run that nothing happens to."""

    digest: str
    step_s: float
    """Seconds per step, checkpoints included."""
    start_s: float
    """Seconds to the first step."""


class World:
    """The folder that drills work in, the data they train on, and the uninterrupted run of each layout.

    Args:
        folder: made.
        num_steps: of every run; four strikes, each within 25 steps of a start, need 150.
    """

    def __init__(self, folder: Path, num_steps: int = 150) -> None:
        self.folder, self.num_steps = folder, num_steps
        self.config = write_assets(folder / "assets")
        self._references: dict[str, Reference] = {}
        self._number = 0

    def run(self, layout: Layout, overrides: Sequence[str], way: str = "hgpt", kind: type[Run] = Run) -> Run:
        self._number += 1
        folder = self.folder / f"{self._number:03d}_{layout.name}"
        shutil.rmtree(folder, ignore_errors=True)
        steps = (f"training.num_steps={self.num_steps}", f"checkpoint.save_interval_steps={SAVE_EVERY}")
        return kind(folder, self.config, [*steps, *QUICK, *layout.overrides, *overrides], way)

    def reference(self, layout: Layout) -> Reference:
        """Trained once; the way of saving does not change what is trained."""
        if layout.name not in self._references:
            run = self.run(layout, ())
            started = time.monotonic()
            try:
                run.start()
                wait_for(lambda: run.step() or run.is_over(), START_S, "first step of the uninterrupted run")
                first = time.monotonic()
                wait_for(run.is_over, START_S, "end of the uninterrupted run")
                assert run.status() == 0, f"the uninterrupted run failed:\n{run.text()[-3000:]}"
            finally:
                run.end()
            self._references[layout.name] = Reference(
                digest=digest(run.newest()), step_s=(time.monotonic() - first) / self.num_steps, start_s=first - started
            )
        return self._references[layout.name]


class Drill:
    """One kind. The base class has the sequence; a kind says when and how it strikes, and what it expects.

    Args:
        world: where.
        layout: of the run.
        save: sync or async.
        rng: draws moments and victims.
    """

    name = "base"
    tries = 0
    """In a whole suite, over all layouts and both ways of saving."""
    overrides: tuple[str, ...] = ()
    way = "hgpt"
    run_type: type[Run] = Run
    ends_equal = True

    def __init__(self, world: World, layout: Layout, save: str, rng: random.Random) -> None:
        self.world, self.layout, self.save, self.rng = world, layout, save, rng
        is_async = f"checkpoint.async_save={str(save == 'async').lower()}"
        self.reference = world.reference(layout)
        self.run = world.run(layout, (is_async, *self.overrides), self.way, self.run_type)

    # What a kind has of its own

    def prepare(self) -> None:
        """Before the first start."""

    def clean(self) -> None:
        """After everything, whatever happened."""

    def wait(self) -> None:
        """Until the moment of the strike: one in five falls into the start, the others up to 25 steps after it."""
        if self.rng.random() < 0.2:
            time.sleep(self.rng.uniform(0, self.reference.start_s))
            return
        self.wait_for_steps(self.rng.randint(1, 25))
        time.sleep(self.rng.uniform(0, self.reference.step_s))

    def strike(self, attempt: Try) -> None:
        """Do it."""

    def check(self, attempt: Try, newest: int) -> None:
        """Training went on: from where it should? `newest` is the newest complete checkpoint's step at the strike."""
        begun = self.run.begun_at()
        attempt.survived = begun is not None and begun >= newest
        if begun is not None and begun < newest:
            attempt.notes.append(f"went on from step {begun}, though {newest} was saved")

    # The sequence

    def wait_for_steps(self, number: int) -> None:
        """Until so many more steps are done than when training began."""

        def is_there() -> bool:
            begun, step = self.run.begun_at(), self.run.step()
            return self.run.is_over() or (begun is not None and step is not None and step >= begun + number)

        wait_for(is_there, START_S, f"{number} steps")

    def play(self, tries: int) -> list[Try]:
        """Strike so often, or until the run is finished; then let it finish and compare."""
        attempts: list[Try] = []
        try:
            self.prepare()
            self.run.start()
            while len(attempts) < tries:
                self.wait()
                if self.run.is_over():
                    break
                attempts.append(Try(kind=self.name, layout=self.layout.name, save=self.save))
                self._strike(attempts[-1])
            self._finish(attempts)
        except TimeIsUpError as error:
            for attempt in attempts[-1:]:
                attempt.survived = False
                attempt.notes.append(str(error))
        finally:
            self.run.end()
            self.clean()
        return attempts

    def _strike(self, attempt: Try) -> None:
        run = self.run
        before, saved = run.text(), run.saved_steps()
        struck = time.monotonic()
        run.forget()
        self.strike(attempt)
        self._until_over_or_begun(attempt)
        last = last_step(before, run.text())
        attempt.in_start = last is None
        if run.is_over():
            attempt.status = run.status()
            self._clear(attempt)
            saved = run.saved_steps()  # a save that was under way may have been completed
            self.start_again(attempt)
        else:
            attempt.is_unattended = True
        newest = max(saved, default=0)
        seconds = time.monotonic() - struck
        begun = run.begun_at() or 0
        attempt.steps_lost = max(0, last - begun) if last is not None else 0
        attempt.steps_since_save = max(0, last - newest) if last is not None else 0
        attempt.seconds_lost = seconds + attempt.steps_lost * self.reference.step_s
        self.check(attempt, newest)

    def _until_over_or_begun(self, attempt: Try) -> None:
        try:
            wait_for(lambda: self.run.is_over() or self.run.begun_at() is not None, END_S, "end of the launcher")
        except TimeIsUpError:
            attempt.notes.append(f"neither over nor training again after {END_S:g} s: ended by the drill")
            self.run.end()

    def _clear(self, attempt: Try) -> None:
        attempt.orphans += len(self.run.remaining(ORPHAN_S))
        self.run.end()

    def start_again(self, attempt: Try) -> None:
        self.run.start()
        wait_for(lambda: self.run.begun_at() is not None or self.run.is_over(), START_S, "training again")
        if self.run.begun_at() is None:
            raise TimeIsUpError(f"start after the strike ended with {self.run.status()}: {last_line(self.run.text())}")

    def _finish(self, attempts: Sequence[Try]) -> None:
        run = self.run
        wait_for(run.is_over, START_S, "end of the run")
        left, status = run.remaining(ORPHAN_S), run.status()
        if status != 0:
            raise TimeIsUpError(f"the run ended with {status}: {last_line(run.text())}")
        is_equal = digest(run.newest()) == self.reference.digest if self.ends_equal else None
        for attempt in attempts:
            attempt.is_equal = is_equal
        for attempt in attempts[-1:]:
            attempt.orphans += len(left)
            attempt.leftovers = run.leftovers()


def last_step(before: str, late: str) -> int | None:
    """The last step of the attempt that was struck: its log until the strike, and the lines that came late."""
    steps = [int(step) for step in STEP.findall(RESUMED.split(before)[-1])]
    for step in STEP.findall(RESUMED.split(late)[0]):
        if steps and int(step) == steps[-1] + 1:
            steps.append(int(step))
    return steps[-1] if steps else None


def last_line(text: str) -> str:
    """Of a log, for a note."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "(silent)"
