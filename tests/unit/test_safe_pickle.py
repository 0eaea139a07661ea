"""Planted and damaged pickles: refused in one line, and nothing in them was run."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.safe_pickle import DCP_METADATA, MAX_PICKLE_BYTES, load_tensors, unpickle

ROOT = Path(__file__).parents[2]


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The map of a small checkpoint, as torch's own writer leaves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = {"w": torch.zeros(4, 3), "b": torch.zeros(2, dtype=torch.bfloat16), "rng/0": torch.zeros(9).byte()}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder / ".metadata"


def test_the_map_of_a_checkpoint_is_read_as_torch_reads_it(metadata: Path) -> None:
    found = unpickle(metadata, DCP_METADATA, CheckpointError)
    with metadata.open("rb") as stream:
        assert found == pickle.load(stream)
    assert isinstance(found, Metadata)
    described = found.state_dict_metadata["b"]
    assert isinstance(described, TensorStorageMetadata)
    assert described.properties.dtype is torch.bfloat16


@pytest.mark.parametrize("function", [os.mkdir, os.system, exec, subprocess.check_output, getattr, torch.load])
def test_a_planted_object_is_refused_and_not_run(
    function: Callable[..., Any], metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = unpickle(metadata, DCP_METADATA, CheckpointError)
    found.planner_data = Runs(function, "trap")
    file = tmp_path / ".metadata"
    file.write_bytes(pickle.dumps(found))
    name = rf"{function.__module__}\.{function.__qualname__}".replace("posix", "(posix|os)")
    with pytest.raises(CheckpointError, match=rf"\.metadata is refused: it names {name}.*; nothing in it was run$"):
        unpickle(file, DCP_METADATA, CheckpointError)
    assert not (tmp_path / "trap").exists()


def test_a_file_cannot_change_a_class(tmp_path: Path) -> None:
    """BUILD with a class as its target and (None, attributes) as the state: `pickle.load` overwrites the method."""
    name = f"c{MetadataIndex.__module__}\n{MetadataIndex.__qualname__}\n".encode()
    attributes = pickle.dumps((None, {"__eq__": 1}), 2)[2:-1]
    file = tmp_path / ".metadata"
    file.write_bytes(b"\x80\x02" + name + attributes + b"b.")
    before = dict(vars(MetadataIndex))
    with pytest.raises(CheckpointError, match="it sets attributes of"):
        unpickle(file, DCP_METADATA, CheckpointError)
    assert dict(vars(MetadataIndex)) == before


def test_every_damage_is_one_line(metadata: Path, tmp_path: Path) -> None:
    content, generator, file = metadata.read_bytes(), random.Random(0), tmp_path / ".metadata"
    damaged = [content[:length] for length in range(0, len(content), 37)]
    for _ in range(300):
        changed = bytearray(content)
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        damaged.append(bytes(changed))
    refused = 0
    for data in damaged:
        file.write_bytes(data)
        try:
            unpickle(file, DCP_METADATA, CheckpointError)
        except CheckpointError as error:
            assert "\n" not in str(error)
            assert str(file) in str(error)
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("instruction", [b"r\xff\xff\xff\x7f", b"\x95" + b"\xff" * 7 + b"\x00", b"\x8e" + b"\xff" * 8])
def test_a_number_in_a_file_reserves_no_memory(instruction: bytes, tmp_path: Path) -> None:
    """A place in the memo, a frame and bytes of absurd size: Python's reader in C would make room for the first."""
    file = tmp_path / ".metadata"
    file.write_bytes(b"\x80\x04}" + instruction + b".")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "import sys, pathlib; from megatron_hgpt.safe_pickle import unpickle\n"
        "from megatron_hgpt.errors import CheckpointError\n"
        "try:\n    unpickle(pathlib.Path(sys.argv[1]), (), CheckpointError)\n"
        "except CheckpointError as error:\n    print(type(error.__cause__).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")
    assert "MemoryError" not in result.stdout


def test_a_missing_and_an_oversized_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        unpickle(tmp_path / ".metadata", DCP_METADATA, CheckpointError)
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(MAX_PICKLE_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"it has {MAX_PICKLE_BYTES + 1} bytes, more than"):
        unpickle(tmp_path / "large", DCP_METADATA, CheckpointError)


def test_classes_of_other_packages_become_stubs_that_hold_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes, instances with arguments and states, functions: none is imported, and the tensors are whole."""
    package = "omegaconf"
    node = type("DictConfig", (), {"__module__": package, "__reduce__": lambda self: (type(self), (1, 2), (3, 4))})
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    sys.modules[package].DictConfig = node  # type: ignore[attr-defined]
    file, tensor = tmp_path / "last.ckpt", torch.arange(5)
    torch.save({"state_dict": {"w": tensor}, "settings": [node, node(), argparse.Namespace(a=1)]}, file)
    monkeypatch.delitem(sys.modules, package)
    content = load_tensors(file, CheckpointError)
    assert torch.equal(content["state_dict"]["w"], tensor)
    assert [vars(stub) for stub in content["settings"][1:]] == [{}, {}]
    assert package not in sys.modules


@pytest.mark.parametrize("function", [os.mkdir, exec, shutil.rmtree, __import__])
def test_what_only_an_attack_has_in_a_file_of_tensors_is_refused(
    function: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Runs(function, "trap")}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt is refused: it names .*, which no file of tensors needs"):
        load_tensors(tmp_path / "last.ckpt", CheckpointError)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """The 40 MB of zeros take 40 kB: what a file needs in memory stays what it has on the disk."""
    torch.save({"state_dict": {"w": torch.zeros(10**7)}}, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole, zipfile.ZipFile(tmp_path / "last.ckpt", "w", 8) as small:
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    assert (tmp_path / "last.ckpt").stat().st_size < 10**5
    with pytest.raises(CheckpointError, match=r"last\.ckpt is refused: it is compressed"):
        load_tensors(tmp_path / "last.ckpt", CheckpointError)


def test_a_file_of_tensors_that_is_cut_off_or_is_none(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(100)}}, file)
    for content in (file.read_bytes()[:300], b"", b"PK\x03\x04", b"text"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"last\.ckpt is refused: .*") as caught:
            load_tensors(file, CheckpointError)
        assert "\n" not in str(caught.value)
