"""Writing files and folders so that a reader sees the old content or the new one, never half of it; reading JSON.

A folder's name is free between two renames, while the old folder makes way for the new one. A process that is killed
right there leaves both beside it: the old one as ``<folder>.old-<host>-<pid>``, which the next `replace_folder` on this
machine puts back.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
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

    A folder that is there already stays as it is until then, and for good when the block or a rename fails.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _settle_retired(folder)
    try:
        yield temporary
        _exchange(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(folder: Path, new: Path) -> None:
    """Put `new` in the place of `folder`; whatever fails, one of the two stands there."""
    retired = folder.with_name(f"{_retired_start(folder)}{os.getpid()}")
    try:
        if folder.exists():
            folder.rename(retired)
        new.rename(folder)
    except BaseException:
        if retired.exists() and not folder.exists():
            retired.rename(folder)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _retired_start(folder: Path) -> str:
    """Of a retired folder's name, before the process: with the machine in it, so that no folder of a user's has it."""
    return f"{folder.name}.old-{platform.node()}-"


def _settle_retired(folder: Path) -> None:
    """Put back or remove what a process left that was killed between the renames of `_exchange`, or right after."""
    start = _retired_start(folder)
    for path in sorted(folder.parent.iterdir()):
        pid = path.name.removeprefix(start)
        if not (path.name.startswith(start) and pid.isdigit()) or _is_alive(int(pid)):
            continue
        if folder.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(folder)


def _is_alive(pid: int) -> bool:
    """Whether this machine has such a process."""
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def why_not_writable(path: Path, *, is_folder: bool) -> str | None:
    """Why no file (or folder) of that name could be written; None where it could: tried with a file without a name."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # says what else is wrong with the name, as its length
        if not is_folder and path.is_dir():
            return "it is a folder"
        places = (path, *path.absolute().parents) if is_folder else path.absolute().parents
        nearest = next(place for place in places if os.path.lexists(place))
        if not nearest.is_dir():
            return f"{nearest} is not a folder"
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return reason_of(error)


def read_json(path: Path, error: type[HealthGPTError] = DataError) -> Json:
    """The JSON object in a file.

    Raises:
        error: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"cannot read {path}: {reason_of(problem)}") from problem
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}, not an object")
    return content
