"""Writing one checkpoint beside training: a thread per rank, which no signal reaches and no collective waits for.

The threads tell each other through the store of torch.distributed, not by collectives: a rank that is stuck keeps
nobody, and what training sends meanwhile cannot get mixed up with it.

    first rank      makes the folder
    every rank      writes its file there, and says what is in it
    first rank      once all have: `.metadata`, description, name
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import json
import platform
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from megatron_hgpt.checkpoint.publication import free_bytes
from megatron_hgpt.checkpoint.shards import Shard, write_shard
from megatron_hgpt.checkpoint.state import Chunk
from megatron_hgpt.errors import reason_of
from megatron_hgpt.rounding import file_size

T = TypeVar("T")

_numbers = itertools.count()
"""Of the saves of this process; every rank takes part in each, and counts alike."""


_UNSEEN_S = 15.0
"""For which a network disk may not show a new folder on another machine."""


class Verdict(enum.IntEnum):
    """What becomes of a save; the greatest that a rank says counts."""

    WRITING = 0
    OVERDUE = 1
    FAILED = 2
    PUBLISHED = 3


class GivenUp(Exception):  # noqa: N818  (ends a thread; nobody sees it)
    """The save is no longer wanted."""


class Bulletin:
    """What the ranks of one save tell each other."""

    def __init__(self, number: int) -> None:
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._prefix = f"checkpoint/{number}"
        self._store: Any = torch.distributed.distributed_c10d._get_default_store()

    def connect(self) -> None:
        """Take a connection of its own: a store serves one call at a time, and training uses it too."""
        self._store = torch.distributed.PrefixStore(self._prefix, self._store.clone())

    def announce_folder(self) -> None:
        """The folder is made."""
        self._store.set("folder", "made")

    @property
    def has_folder(self) -> bool:
        """Whether the first rank made it. Nobody looks before: a network disk remembers for long what was not there."""
        return bool(self._store.check(["folder"]))

    def hand_in(self, content: dict[str, Any]) -> None:
        """What this rank wrote."""
        self._store.set(f"shard/{self.rank}", zlib.compress(json.dumps(content).encode()))
        self._store.add("written", 1)

    @property
    def is_complete(self) -> bool:
        """Whether every rank has handed in."""
        return bool(self._store.add("written", 0) == self.world_size)

    def handed_in(self) -> list[dict[str, Any]]:
        """What the ranks wrote, in their order, once it is complete."""
        every = []
        for rank in range(self.world_size):
            every.append(json.loads(zlib.decompress(self._store.get(f"shard/{rank}"))))
            self._store.delete_key(f"shard/{rank}")
        return every

    def missing(self) -> list[int]:
        """Ranks that have not handed in, as long as it is not complete."""
        return [rank for rank in range(self.world_size) if not self._store.check([f"shard/{rank}"])]

    def report_failure(self, reason: str) -> None:
        """This rank cannot write."""
        self._store.set(f"failure/{self.rank}", reason)
        self._store.add("failures", 1)

    def failures(self) -> str | None:
        """What ranks report, in one text; None as long as nobody does."""
        if self._store.add("failures", 0) == 0:
            return None
        ranks = [rank for rank in range(self.world_size) if self._store.check([f"failure/{rank}"])]
        return "; ".join(f"rank {rank}: {self._store.get(f'failure/{rank}').decode()}" for rank in ranks)


class Save(threading.Thread, Generic[T]):
    """One save of this rank, from a snapshot to the folder's name; `start` begins it.

    Args:
        folder: to write to; the first rank makes it.
        chunks: what this rank writes, in the host's memory; a text says why there is nothing.
        notes: of this rank, for `describe`.
        make: the first rank's: makes the folder.
        describe: the first rank's: gets the shards and notes of all ranks, in their order; returns the folder's bytes.
        publish: the first rank's: gets those bytes, and gives the folder its name.
        deadline_s: seconds from now until it is overdue.
    """

    def __init__(
        self,
        *,
        folder: Path,
        chunks: Sequence[Chunk] | str,
        notes: dict[str, Any],
        make: Callable[[], None],
        describe: Callable[[list[Shard], list[dict[str, Any]]], int],
        publish: Callable[[int], T],
        deadline_s: float,
    ) -> None:
        # A daemon: a disk that never answers does not keep the process.
        super().__init__(name=f"checkpoint {folder.name}", daemon=True)
        self.folder, self.deadline_s = folder, deadline_s
        self.published: T | None = None
        """What `publish` returned."""
        self.failure: str | None = None
        self._chunks, self._notes = chunks, notes
        self._make, self._describe, self._publish = make, describe, publish
        self._bulletin = Bulletin(next(_numbers))
        self._ends_at = time.monotonic() + deadline_s
        self._is_given_up = threading.Event()

    def run(self) -> None:
        """See `threading.Thread.run`."""
        try:
            self._bulletin.connect()
            self._write()
        except GivenUp:
            pass
        except Exception as error:
            self._fail(self._reason(error))
        finally:
            self._chunks = ()  # a save that was given up keeps no memory longer than it must
            if self._is_first and self.published is None:
                shutil.rmtree(self.folder, ignore_errors=True)

    def verdict(self) -> Verdict:
        """How far the save is, alike on every rank; every rank must call it."""
        mine = Verdict.OVERDUE if time.monotonic() > self._ends_at else Verdict.WRITING
        if self._is_first and not self.is_alive():
            mine = Verdict.PUBLISHED if self.published is not None else Verdict.FAILED
        if self._bulletin.world_size == 1:
            return mine
        flag = torch.tensor([mine], device=torch.cuda.current_device())
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return Verdict(int(flag.item()))

    def wait(self) -> Verdict:
        """The verdict once there is one; every rank must call it."""
        pause_s = 0.001
        while (verdict := self.verdict()) is Verdict.WRITING:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
        return verdict

    def give_up(self) -> str:
        """Publish it no more; returns why, as the first rank knows it."""
        self._is_given_up.set()
        if not self._is_first:
            return "the first rank says why"
        if self.failure is not None:
            return self.failure
        late = self._bulletin.missing()
        who = f"rank {', '.join(map(str, late))} has not written" if late else "the first rank has not published"
        return f"{who} within {self.deadline_s:g} s (timeouts.save_s)"

    @property
    def _is_first(self) -> bool:
        return self._bulletin.rank == 0

    def _write(self) -> None:
        if isinstance(self._chunks, str):
            return self._fail(self._chunks)
        if self._is_first:
            self._make()
            self._bulletin.announce_folder()
        else:
            self._wait_until(lambda: self._bulletin.has_folder)
            self._see_folder()
        shard = write_shard(self.folder, self._bulletin.rank, self._chunks, self._check)
        self._bulletin.hand_in({"shard": shard.to_json(), "notes": self._notes})
        if self._is_first:
            self._wait_until(lambda: self._bulletin.is_complete or self._bulletin.failures() is not None)
            if (failures := self._bulletin.failures()) is not None:
                self.failure = failures
                return None
            every = self._bulletin.handed_in()
            self._check()
            size = self._describe([Shard.from_json(one["shard"]) for one in every], [one["notes"] for one in every])
            self._check()
            self.published = self._publish(size)
        return None

    def _see_folder(self) -> None:
        patience_s = time.monotonic() + _UNSEEN_S
        self._wait_until(lambda: self.folder.is_dir() or time.monotonic() > patience_s)
        if not self.folder.is_dir():
            raise OSError(f"{self.folder} is not seen on {platform.node()}; checkpoints need a disk that all share")

    def _check(self) -> None:
        if self._is_given_up.is_set():
            raise GivenUp

    def _wait_until(self, is_there: Callable[[], bool]) -> None:
        pauses_s: Iterator[float] = itertools.chain((0.001, 0.002, 0.005, 0.01, 0.02), itertools.repeat(0.05))
        while not is_there():
            self._check()
            time.sleep(next(pauses_s))

    def _fail(self, reason: str) -> None:
        self.failure = f"rank {self._bulletin.rank}: {reason}"
        if not self._is_first:
            with contextlib.suppress(RuntimeError):  # the first rank has ended
                self._bulletin.report_failure(reason)

    def _reason(self, error: Exception) -> str:
        reason = " ".join((reason_of(error) or type(error).__name__).split())
        if isinstance(error, OSError) and self.folder.parent.is_dir():
            return f"{reason}, {file_size(free_bytes(self.folder.parent))} are free"
        return reason
