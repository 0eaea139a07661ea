"""Tries as one table."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from tests.drills.sequence import Try

HEADER = (
    "drill", "layout", "tries", "survived", "by itself", "steps lost: mean, max (since the last save)",
    "seconds lost: mean, max", "named after s", "ended after s", "exit status", "bit-identical", "orphans", "leftovers",
)  # fmt: skip


def _range(values: Iterable[float | None], digits: int = 0) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.1f}, {max(known):.{digits}f}" if known else "-"


def _row(names: tuple[str, str], tries: Sequence[Try]) -> tuple[str, ...]:
    compared = [attempt.is_equal for attempt in tries if attempt.is_equal is not None]
    statuses = Counter(attempt.status for attempt in tries if attempt.status is not None)
    since = [attempt.steps_since_save for attempt in tries if attempt.steps_since_save is not None]
    return (
        *names,
        str(len(tries)),
        str(sum(attempt.survived for attempt in tries)),
        str(sum(attempt.is_unattended for attempt in tries)),
        _range(attempt.steps_lost for attempt in tries) + (f" ({max(since)})" if since else ""),
        _range((attempt.seconds_lost for attempt in tries), 1),
        _range((attempt.named_s for attempt in tries), 1),
        _range((attempt.ended_s for attempt in tries), 1),
        " ".join(f"{status}x{count}" for status, count in sorted(statuses.items())) or "-",
        f"{sum(compared)}/{len(compared)}" if compared else "-",
        str(sum(attempt.orphans for attempt in tries)),
        str(sum(len(attempt.leftovers) for attempt in tries)),
    )


def table(tries: Sequence[Try], by: Callable[[Try], tuple[str, str]]) -> str:
    """Markdown: a row per value of `by` (two words), in the order of appearance, and one for all."""
    groups: dict[tuple[str, str], list[Try]] = {}
    for attempt in tries:
        groups.setdefault(by(attempt), []).append(attempt)
    rows = [HEADER, tuple("---" for _ in HEADER), *(_row(names, group) for names, group in groups.items())]
    if len(groups) > 1:
        rows.append(_row(("all", ""), tries))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def heading(seed: int) -> str:
    """When, from which seed and source, and on what kind of machine; its name is nobody's business."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"{time.strftime('%Y-%m-%d')}, seed {seed}, commit {git.stdout.strip() or 'unknown'}, {machine}"


def failures(tries: Sequence[Try]) -> list[str]:
    """A line per try that was not survived, or left something."""
    lines = []
    for attempt in tries:
        bad = not attempt.survived or attempt.is_equal is False or attempt.orphans or attempt.leftovers
        lost_more = (attempt.steps_lost or 0) > (attempt.steps_since_save or 0) and attempt.kind.startswith("SIGKILL")
        if bad or lost_more:
            what = [] if attempt.survived else ["not survived"]
            what += ["other weights"] if attempt.is_equal is False else []
            what += [f"{attempt.orphans} orphans"] if attempt.orphans else []
            what += [f"leftovers {attempt.leftovers}"] if attempt.leftovers else []
            what += [f"{attempt.steps_lost} steps lost, {attempt.steps_since_save} since the save"] if lost_more else []
            lines.append(f"{attempt.kind}, {attempt.layout}, {attempt.save}: {'; '.join([*what, *attempt.notes])}")
    return lines
