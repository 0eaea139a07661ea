"""Planted and damaged files of tensors: refused in one line, and nothing in them was run."""

from __future__ import annotations

import os
import shutil
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.safe_pickle import load_tensors


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def test_classes_of_other_packages_become_stubs_that_hold_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes, instances with arguments and states, functions: none is imported, and the tensors are whole."""
    package = "omegaconf"
    node = type("DictConfig", (), {"__module__": package, "__reduce__": lambda self: (type(self), (1, 2), (3, 4))})
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    sys.modules[package].DictConfig = node  # type: ignore[attr-defined]
    file, tensor = tmp_path / "last.ckpt", torch.arange(5)
    torch.save({"state_dict": {"w": tensor}, "settings": [node, node()]}, file)
    monkeypatch.delitem(sys.modules, package)
    content = load_tensors(file, CheckpointError)
    assert torch.equal(content["state_dict"]["w"], tensor)
    assert vars(content["settings"][1]) == {}
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
