"""Writing files and folders so that a reader sees the old content or the new one, never half of it; reading JSON.

A folder is written as ``<folder>.tmp-<host>-<pid>`` and then takes its place: in one step where the filesystem can
exchange two names (Linux's own can), else in two renames, with the old folder as ``<folder>.old-<host>-<pid>`` between.
What a killed process left of either is put back or removed by the next `replace_folder`. Content is on the disk before
it gets its name, so that a power cut leaves no empty files either.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hgpt.errors import DataError, HealthGPTError, reason_of

logger = logging.getLogger(__name__)

Json = dict[str, Any]
"""An object of a JSON file: what it holds is checked where it is read."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""A full disk, a quota, a limit on files, a read-only filesystem, no permission: what only the user can mend."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""Answers of a filesystem without locks."""
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of Linux's renameat2."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) beside `path`, then move it into place; parent folders are created.

    Raises:
        OSError: it cannot be written; it names `path`, whose content is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` to fill, which takes its place when the block ends well.

    A folder that is there already stays as it is until then, and for good when the block or a rename fails.

    Raises:
        DataError: another process writes `folder` now; or it cannot be written: no room, read-only, no permission.
    """
    start = f"{platform.node()}-{os.getpid()}"
    temporary = folder.with_name(f"{folder.name}.tmp-{start}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(folder):
            _settle_leftovers(folder)
            temporary.mkdir()
            try:
                yield temporary
                _sync_tree(temporary)
                _take_place(temporary, folder)
            except OSError as error:
                _explain(error, folder, temporary)
                raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:  # before there was anything to fill
        _explain(error, folder, temporary)
        raise


def _explain(error: OSError, folder: Path, temporary: Path) -> None:
    """Say in one line what stopped writing `folder`, where the error is about that and for the user to mend.

    Raises:
        DataError: that line.
    """
    is_short = error.errno is None and "requested and" in str(error)  # NumPy's words for a write that came up short
    name = None if error.filename is None else os.fspath(error.filename)
    is_about = name is None or name.startswith(str(folder)) or folder.is_relative_to(name)
    if not is_about or not (is_short or error.errno in _NO_ROOM):
        return
    written = sum(path.stat().st_size for path in temporary.rglob("*")) if temporary.is_dir() else 0
    free = free_bytes(folder)
    raise DataError(
        f"{folder} cannot be written ({reason_of(error)}): {written / 2**20:.1f} MiB were and more is needed, "
        f"{free / 2**20:.1f} MiB are free; make room or choose another place; "
        f"{'the folder that was there is as before' if folder.exists() else 'nothing is left of it'}"
    ) from error


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def free_bytes(path: Path) -> int:
    """What this user may still write to the disk where a file or folder is, or is to be."""
    return shutil.disk_usage(_existing(path)).free


def require_room(folder: Path, num_bytes: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        DataError: less than `num_bytes` are free where `folder` is.
    """
    free = free_bytes(folder)
    if free < num_bytes:
        need = f"{num_bytes / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free"
        raise DataError(f"{folder} needs {need}; make room or choose another place")


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold ``<path>.lock`` while `path` is written; it ends with the process.

    Raises:
        DataError: another process holds it.
    """
    lock = path.with_name(f"{path.name}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
                os.close(descriptor)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise DataError(f"{path} is being written by {owner}; wait for it, or choose another folder") from error
            logger.warning("%s: this filesystem has no locks; see to it that nothing else writes there", path)
        if _is_at(descriptor, lock):
            break
        os.close(descriptor)  # its holder took it away in between
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _take_place(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; whatever fails, one of the two stands there."""
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        retired = folder.with_name(f"{folder.name}.old-{platform.node()}-{os.getpid()}")
        try:
            folder.rename(retired)
            new.rename(folder)
        except BaseException:
            if retired.exists() and not folder.exists():
                retired.rename(folder)
            raise
        shutil.rmtree(retired, ignore_errors=True)
    sync_folder(folder.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the filesystem cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), os.fspath(second))


def _settle_leftovers(folder: Path) -> None:
    """Put back or remove what killed writers of `folder` left; what may be another's is named only.

    A user's own folder has no machine and process in its name.
    """
    pattern = re.compile(rf"{re.escape(folder.name)}\.(tmp|old)-(.+)-(\d+)")
    for path in sorted(folder.parent.iterdir()):
        if (match := pattern.fullmatch(path.name)) is None:
            continue
        kind, host, pid = match[1], match[2], int(match[3])
        if host != platform.node() or (pid != os.getpid() and _is_alive(pid)):
            logger.warning("%s may be left by a process that was killed; delete it if so", path)
        elif kind == "old" and not folder.exists():
            path.rename(folder)
            logger.warning("%s is back: a process was killed while it replaced it", folder)
        else:
            shutil.rmtree(path, ignore_errors=True)
            logger.warning("%s was left by a process that was killed; removed", path)


def _is_alive(pid: int) -> bool:
    """Whether this machine has such a process."""
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's; a number that is no process's
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


def _sync_tree(folder: Path) -> None:
    """Wait until files and folders below, and their names, are on the disk."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif not path.is_symlink():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the filesystem knows that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def sealed(content: Json) -> Json:
    """A description as JSON will give it back, with the ``digest`` of everything else in it."""
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != "digest"}))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return {**plain, "digest": hashlib.sha256(text.encode()).hexdigest()}


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def printable(text: str) -> str:
    """Text that UTF-8 can hold: what it cannot (a file name of other bytes, half a character) becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


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
