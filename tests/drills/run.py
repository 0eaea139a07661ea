"""The drill suite: runs that are killed, stopped and damaged at random moments, and one table of what became of them.

python -m tests.drills.run                              everything: about an hour on 2 cores
python -m tests.drills.run --kinds SIGKILL --seed 3     100 kills over all layouts (25 minutes)
python -m tests.drills.run --kinds "flipped bit" --layouts tp2 --tries 2
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.drills.kinds import KINDS, DiskFull, can_mount
from tests.drills.nodes import LostNode, ShrunkRun, can_make_namespaces, unfit
from tests.drills.processes import LAYOUTS
from tests.drills.sequence import Drill, World
from tests.drills.table import failures, heading, table

ALL: dict[str, type[Drill]] = {**KINDS, LostNode.name: LostNode, ShrunkRun.name: ShrunkRun}
SAVES = ("sync", "async")
STRIKES_PER_RUN = 4


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds", nargs="+", default=list(ALL), metavar="KIND", help=f"names or beginnings of {list(ALL)}"
    )
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--saves", nargs="+", default=list(SAVES), choices=SAVES, help="how checkpoints are written")
    parser.add_argument("--tries", type=int, help="of each kind, over all layouts; default: each kind's own")
    parser.add_argument("--seed", type=int, default=1, help="of moments and victims")
    parser.add_argument("--folder", type=Path, help="where to work and what to keep; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=Path("runs/drills"), help="gets table.md and tries.jsonl")
    return parser.parse_args()


def main() -> int:
    """Play all, print as it goes, and write the table; 1 where a try was not survived as it should be."""
    given = arguments()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: sys.exit(130))  # drills clean up behind themselves
    with tempfile.TemporaryDirectory(prefix="drills_") as temporary:
        return play(given, given.folder or Path(temporary))


def say(text: str) -> None:
    """A line at once, also into a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def play(given: argparse.Namespace, folder: Path) -> int:
    kinds = [kind for name, kind in ALL.items() if any(name.startswith(start) for start in given.kinds)]
    layouts = [LAYOUTS[name] for name in given.layouts]
    if importlib.util.find_spec("deepspeed") is None and LAYOUTS["deepspeed"] in layouts:
        say("deepspeed is not installed: its layout is left out")
        layouts.remove(LAYOUTS["deepspeed"])
    if (disks := [kind for kind in kinds if issubclass(kind, DiskFull)]) and not can_mount(folder / "mount"):
        say("a tmpfs cannot be mounted here: full disks are left out")
        kinds = [kind for kind in kinds if kind not in disks]
    if (nodes := [kind for kind in kinds if issubclass(kind, LostNode)]) and not can_make_namespaces():
        say("network namespaces cannot be made here: the lost node is left out")
        kinds = [kind for kind in kinds if kind not in nodes]
    world, tries, started = World(folder), [], time.monotonic()
    for kind in kinds:
        wanted = kind.tries if given.tries is None else given.tries
        cells = [cell for cell in itertools.product(layouts, given.saves) if not unfit(cell[0].name, kind)]
        random.Random(f"{given.seed} {kind.name}").shuffle(cells)
        # A run is struck several times: a start is most of a try's time.
        counts = [wanted // len(cells) + (number < wanted % len(cells)) for number in range(len(cells))]
        for (layout, save), count in zip(cells, counts, strict=True):
            done = 0
            while done < count:
                rng = random.Random(f"{given.seed} {kind.name} {layout.name} {save} {done}")
                new = kind(world, layout, save, rng).play(min(count - done, STRIKES_PER_RUN))
                done += max(len(new), 1)
                tries += new
                for attempt in new:
                    say(f"{time.monotonic() - started:6.0f} s  {dataclasses.asdict(attempt)}")
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "tries.jsonl").write_text("".join(json.dumps(dataclasses.asdict(a)) + "\n" for a in tries))
    text = f"{heading(given.seed)}\n\n{table(tries, lambda a: (a.kind, 'all'))}\n\n"
    text += f"{table(tries, lambda a: (a.layout, a.save))}\n"
    bad = failures(tries)
    text += "".join(f"\n* {line}" for line in bad) or "\nNothing was lost."
    text += f"\n\n{len(tries)} tries in {time.monotonic() - started:.0f} s"
    (given.output / "table.md").write_text(text + "\n")
    say(text)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
