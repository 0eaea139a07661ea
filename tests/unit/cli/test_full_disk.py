"""A disk that is full or read-only ends a command with one line that names path, need and what is intact."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_hgpt.cli import main
from megatron_hgpt.data.mmap_format import DatasetReader
from tests.disks import small_disk

NO_ROOM = (
    r"{folder} cannot be written \(No space left on device\): [0-9.]+ MiB were and more is needed, 0\.\d MiB are free"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    with small_disk(tmp_path / "small", "1m") as place:
        yield place


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a command that must say one line and leave only `left` on the disk."""

    def run(arguments: list[str], message: str, disk: Path, left: list[str]) -> None:
        capsys.readouterr()
        assert main(arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "Error" in line or "Traceback" in line]
        assert len(lines) == 1 and re.match(f"(Data|Config)Error: {message}", lines[0]), lines
        assert sorted(path.name for path in disk.iterdir()) == left

    return run


def pictures(folder: Path, count: int) -> Path:
    """Records of noise pictures, some 50 KiB each."""
    folder.mkdir()
    records = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nCT?"}, {"from": "gpt", "value": "no"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "few.json").write_text(json.dumps(records[:3]))
    (folder / "many.json").write_text(json.dumps(records))
    return folder


def test_preprocess(disk: Path, tmp_path: Path, tiny_run: Path, fails: Callable[..., None]) -> None:
    raw, folder = pictures(tmp_path / "raw", 40), disk / "data"
    common = ["preprocess", "--config", str(tiny_run), "--output", str(folder), "--window", "4"]
    message = NO_ROOM.format(folder=folder)
    fails([*common, "--input", str(raw / "many.json")], f"{message}.*; nothing is left of it$", disk, [])
    assert main([*common, "--input", str(raw / "few.json")]) == 0
    overwrite = [*common, "--overwrite", "--input", str(raw / "many.json")]
    fails(overwrite, f"{message}.*; the folder that was there is as before$", disk, ["data"])
    assert len(DatasetReader(folder, verify_checksums=True)) == 3
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    message = rf"--output {folder} cannot be written: Read-only file system; name another place$"
    fails(overwrite, message, disk, ["data"])


def test_cache_features(disk: Path, tmp_path: Path, tiny_run: Path, fails: Callable[..., None]) -> None:
    raw, folder = pictures(tmp_path / "raw", 12), disk / "data"
    written = ["preprocess", "--config", str(tiny_run), "--output", str(folder), "--input", str(raw / "many.json")]
    assert main(written) == 0
    command = ["cache-features", "--config", str(tiny_run), "--dataset", str(folder)]
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 12_000))
    message = rf"{folder}/features\S* needs [0-9.]+ MiB, 0.0 MiB are free; make room"
    fails(command, message, disk, ["ballast", "data"])
    assert not list(folder.glob("features*"))
    (disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    fails(command, rf"the cache {folder}/features cannot be written: Read-only file system", disk, ["data"])


def test_train_vqgan(disk: Path, tmp_path: Path, fails: Callable[..., None]) -> None:
    raw, folder = pictures(tmp_path / "raw", 10), disk / "vqgan"
    command = ["train-vqgan", "--images", str(raw), "--output", str(folder), "--steps", "2", "--num-codes", "4"]
    (disk / "ballast").write_bytes(bytes(900_000))
    fails([*command, "--resolution", "16"], f"{NO_ROOM.format(folder=folder)}.*; nothing is left", disk, ["ballast"])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    fails(command, rf"--output {folder} cannot be written: Read-only file system", disk, ["ballast"])


def test_two_commands_of_one_output(tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_hgpt.files import only_writer

    records = tiny_run.parent / "records.jsonl"
    command = ["preprocess", "--config", str(tiny_run), "--output", str(tmp_path / "data"), "--input", str(records)]
    with only_writer(tmp_path / "data"):
        assert main(command) == 2
    assert re.search(
        r"DataError: \S+/data is being written by process \d+ on \S+; wait for it", capsys.readouterr().err
    )
    assert main(command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
