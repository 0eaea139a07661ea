"""Files of a checkpoint folder against its description."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_hgpt.checkpoint.integrity import wrong_sizes


def info(num_bytes: int) -> dict[str, object]:
    return {"files": {"shard": {"bytes": num_bytes, "sha256": "0"}}}


def test_a_pipe_or_a_device_is_no_file(tmp_path: Path) -> None:
    """Of 0 bytes both: opening the one, or reading the other, would never end."""
    os.mkfifo(tmp_path / "shard")
    assert wrong_sizes(tmp_path, info(0)) == f"{tmp_path / 'shard'}: not an ordinary file"
    (tmp_path / "shard").unlink()
    (tmp_path / "shard").symlink_to("/dev/zero")
    assert wrong_sizes(tmp_path, info(0)) == f"{tmp_path / 'shard'}: not an ordinary file"


@pytest.mark.parametrize("is_link", [False, True])
def test_an_ordinary_file_or_a_link_to_one_counts(is_link: bool, tmp_path: Path) -> None:
    target = tmp_path / ("elsewhere" if is_link else "shard")
    target.write_bytes(b"xyz")
    if is_link:
        (tmp_path / "shard").symlink_to(target)
    assert wrong_sizes(tmp_path, info(3)) is None
    assert "3 bytes, healthgpt.json says 4" in str(wrong_sizes(tmp_path, info(4)))
