from __future__ import annotations

import os

import pytest

from megatron_hgpt.files import write_atomic


def test_replaces_the_content_and_creates_folders(tmp_path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "old")
    write_atomic(path, "nëw")
    assert path.read_text(encoding="utf-8") == "nëw"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_failure_keeps_the_old_content(tmp_path, monkeypatch) -> None:
    path = tmp_path / "b.txt"
    write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["b.txt"]
