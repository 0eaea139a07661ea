"""docs/operations.md names, in every section of what happens, the drills and tests that show it, and each is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py")))


def test_every_test_and_file_that_is_named_is_there() -> None:
    names = re.findall(r"`(test_\w+)`", PAGE)
    assert len(names) > 40
    assert [name for name in names if f"def {name}(" not in TESTS] == []
    assert [path for path in re.findall(r"`(tests/\S+?)`", PAGE) if not (ROOT / path).exists()] == []


def test_every_drill_that_is_named_is_there() -> None:
    """An ellipsis stands for the rest of several names."""
    kinds = re.findall(r'^    name = "(.+)"$', TESTS, re.M)
    named = re.findall(r"\*((?:SIG|lost|flipped|planted|full)[^*]*)\*", PAGE)
    assert len(named) > 10
    assert [name for name in named if not any(kind.startswith(name.removesuffix("…").strip()) for kind in kinds)] == []


def test_every_section_of_what_happens_names_a_test() -> None:
    sections = re.split(r"^## ", PAGE, flags=re.M)[1:]
    shown = {section.splitlines()[0]: "`test_" in section for section in sections}
    assert [title for title, has_test in shown.items() if not has_test] == ["In short", "Drills"]


def test_lines_outside_tables_are_short() -> None:
    assert [line for line in PAGE.splitlines() if len(line) > 140 and not line.startswith("|")] == []
