from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hgpt.files import replace_folder, write_atomic


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


def fill(folder: Path, content: str) -> None:
    with replace_folder(folder) as temporary:
        (temporary / "file").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    fill(folder, "old")
    (folder / "more").write_text("old")
    fill(folder, "new")
    assert names(tmp_path) == ["data"] and names(folder) == ["file"]
    assert (folder / "file").read_text() == "new"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_keeps_the_old_folder(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "data", "old")
    rename, calls = Path.rename, []

    def fail(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError("stale file handle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="stale"):
        fill(tmp_path / "data", "new")
    assert names(tmp_path) == ["data"] and (tmp_path / "data" / "file").read_text() == "old"


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_put_back(tmp_path: Path) -> None:
    folder, left = tmp_path / "data", tmp_path / f"data.old-{platform.node()}-{dead_pid()}"
    fill(left, "old")
    with pytest.raises(ZeroDivisionError), replace_folder(folder):
        assert (folder / "file").read_text() == "old"
        _ = 1 / 0
    assert names(tmp_path) == ["data"] and (folder / "file").read_text() == "old"


def test_what_a_killed_process_left_beside_newer_data_goes(tmp_path: Path) -> None:
    fill(tmp_path / f"data.old-{platform.node()}-{dead_pid()}", "older")
    for other in (f"data.old-{platform.node()}-{os.getppid()}", "data.old-2025"):
        fill(tmp_path / other, "of a living process, and a user's own")
    fill(tmp_path / "data", "new")
    assert (tmp_path / "data" / "file").read_text() == "new"
    fill(tmp_path / "data", "newer")
    assert len(names(tmp_path)) == 3 and (tmp_path / "data" / "file").read_text() == "newer"
