from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_hgpt import files
from megatron_hgpt.errors import DataError
from megatron_hgpt.files import replace_folder, require_room, write_atomic
from tests import disks


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


def test_a_reader_always_finds_a_folder(tmp_path: Path) -> None:
    folder, done, missed = tmp_path / "data", threading.Event(), []
    fill(folder, "0")

    def read() -> None:
        while not done.is_set():
            try:
                (folder / "file").stat()
            except FileNotFoundError:
                missed.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        fill(folder, str(number))
    done.set()
    reader.join()
    if not files._exchange(folder, folder):
        pytest.skip("this filesystem cannot exchange two names")
    assert not missed


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_keeps_the_old_folder(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "data", "old")
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
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


def test_what_a_killed_process_left_beside_newer_data_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dead = dead_pid()
    for kind in ("old", "tmp"):
        (tmp_path / f"data.{kind}-{platform.node()}-{dead}").mkdir()
    (tmp_path / "data").mkdir()
    others = (f"data.old-{platform.node()}-{os.getppid()}", "data.old-2025", "data.tmp-elsewhere-7", "data2")
    for other in others:
        (tmp_path / other).mkdir()
    fill(tmp_path / "data", "new")
    assert (tmp_path / "data" / "file").read_text() == "new"
    fill(tmp_path / "data", "newer")
    assert names(tmp_path) == sorted(["data", *others]) and (tmp_path / "data" / "file").read_text() == "newer"
    assert caplog.text.count("was left by a process that was killed; removed") == 2
    assert f"{tmp_path}/data.tmp-elsewhere-7 may be left by a process that was killed; delete it if so" in caplog.text


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write_atomic(tmp_path / "b.txt", "x")
    assert synced == [f"b.txt.tmp-{os.getpid()}", tmp_path.name]
    synced.clear()
    with replace_folder(tmp_path / "data") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("x")
    assert synced == [temporary.name, "sub", "file", tmp_path.name]


WRITER = """
import sys, time
from pathlib import Path
from megatron_hgpt.files import replace_folder
with replace_folder(Path(sys.argv[1])) as temporary:
    (temporary / "file").write_text("first")
    print("ready", flush=True)
    time.sleep(600)
"""


def writer(folder: Path) -> subprocess.Popen[str]:
    """Another process in the middle of writing `folder`."""
    command = [sys.executable, "-c", WRITER, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_one_writer_at_a_time_and_a_killed_one_is_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "data"
    process = writer(folder)
    try:
        held = f"{folder} is being written by process {process.pid} on {platform.node()}; wait for it"
        with pytest.raises(DataError, match=re.escape(held)):
            fill(folder, "second")
    finally:
        process.kill()
        process.wait()
    assert len(names(tmp_path)) == 2  # what it had written, and its lock
    fill(folder, "second")
    assert names(tmp_path) == ["data"] and (folder / "file").read_text() == "second"
    assert f"{folder}.tmp-{platform.node()}-{process.pid} was left by a process that was killed; removed" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    with disks.small_disk(tmp_path / "small", "1m") as place:
        yield place


def test_a_full_disk_is_one_line_and_the_old_folder_stays(small_disk: Path) -> None:
    folder = small_disk / "data"
    for there, intact in ((False, "nothing is left of it"), (True, "the folder that was there is as before")):
        with pytest.raises(DataError) as caught, replace_folder(folder) as temporary:
            np.zeros(1 << 19, np.uint8).tofile(temporary / "a.npy")
            (temporary / "b").write_bytes(bytes(1 << 20))
        line = str(caught.value)
        assert line.startswith(f"{folder} cannot be written (No space left on device): ") and line.endswith(intact)
        assert "): 1.0 MiB were and more is needed, 0.0 MiB are free" in line and names(small_disk) == (
            ["data"] if there else []
        )
        fill(folder, "old")
    with pytest.raises(DataError, match="cannot be written .* requested and"), replace_folder(folder) as temporary:
        np.zeros(1 << 21, np.uint8).tofile(temporary / "a.npy")  # NumPy's error has no number
    with pytest.raises(OSError) as full:
        write_atomic(small_disk / "data" / "file", bytes(1 << 21))
    assert full.value.filename == str(small_disk / "data" / "file")
    assert (folder / "file").read_text() == "old" and names(folder) == ["file"]


def test_a_read_only_place_is_one_line(small_disk: Path) -> None:
    fill(small_disk / "data", "old")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(DataError, match=r"cannot be written \(Read-only file system\).*is as before"):
        fill(small_disk / "data", "new")
    with pytest.raises(DataError, match=r"cannot be written \(Read-only file system\).*nothing is left"):
        fill(small_disk / "a" / "b", "new")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replace_folder(tmp_path / "data"):
        (tmp_path / "absent").read_text()
    assert names(tmp_path) == []


def test_room_is_compared_with_the_need(small_disk: Path) -> None:
    require_room(small_disk / "a" / "b", 1 << 19)
    with pytest.raises(DataError, match=r"b needs 2.0 MiB, 1.0 MiB are free; make room"):
        require_room(small_disk / "a" / "b", 1 << 21)
