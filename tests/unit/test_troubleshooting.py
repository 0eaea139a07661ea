"""docs/troubleshooting.md quotes what the package says: each heading in code marks is found in a message of it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.*)`$", PAGE, re.M)


def messages() -> list[str]:
    """Every string of the package, with … in place of values."""
    found = []
    for path in sorted((ROOT / "megatron_hgpt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[\w.]*", "…", node.value))
    return found


def is_said(quoted: str, said: list[str]) -> bool:
    """Whether one message has all fixed parts of the quotation, in order."""
    pattern = ".*?".join(re.escape(part) for part in quoted.split("…"))
    return any(re.search(pattern, message, re.S) for message in said)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return messages()


def test_the_check_can_fail(said: list[str]) -> None:
    assert len(QUOTED) > 20
    assert not is_said("no message … says this", said)


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda text: text[:40])
def test_a_quoted_message_exists(quoted: str, said: list[str]) -> None:
    assert is_said(quoted, said)


def test_every_entry_says_what_to_do() -> None:
    for entry in re.split(r"^### .*$", PAGE, flags=re.M)[1:]:
        body = re.split(r"^## ", entry, maxsplit=1, flags=re.M)[0].strip()
        assert len(body) > 20
