"""The owner's file while it is owned; takeovers by real processes are in tests/distributed/test_processes.py."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megatron_hgpt import ownership
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.ownership import FolderOwner


def test_a_file_that_was_removed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rm run.lock` is no other run: the owner goes on, and still owns."""
    monkeypatch.setattr(ownership, "BEAT_S", 0.1)
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.3)
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    path = tmp_path / ownership.LOCK_FILE
    with FolderOwner(tmp_path):
        path.unlink()
        deadline = time.monotonic() + 10
        while not path.exists() or not path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(ConfigError, match="belongs to a run that is alive"), FolderOwner(tmp_path):
            pass
        assert ends == []
    assert not path.exists()


def test_a_lock_that_is_refused_is_not_taken_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "DEAD_AFTER_S", 0.3)
    monkeypatch.setattr(ownership, "LEASE_S", 1.0)
    with FolderOwner(tmp_path):
        monkeypatch.setattr(ownership, "_machine", lambda: "another")
        with pytest.raises(ConfigError, match="belongs to a run that is alive"), FolderOwner(tmp_path):
            pass
        monkeypatch.undo()
