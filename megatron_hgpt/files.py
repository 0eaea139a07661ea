"""Writing files and folders so that a reader sees the old content or the new one, never half of it; reading JSON."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hgpt.errors import DataError, HealthGPTError, reason_of

Json = dict[str, Any]
"""An object of a JSON file: what it holds is checked where it is read."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) beside `path`, then move it into place; parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty ``<folder>.tmp-<pid>`` to fill, which takes the place of `folder` when the block ends well.

    A folder that is there already stays as it is until then, and for good when the block raises.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    retired = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rename(retired)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(retired, ignore_errors=True)


def read_json(path: Path, error: type[HealthGPTError] = DataError) -> Json:
    """The JSON object in a file.

    Raises:
        error: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise error(f"cannot read {path}: {reason_of(problem)}") from problem
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}, not an object")
    return content
