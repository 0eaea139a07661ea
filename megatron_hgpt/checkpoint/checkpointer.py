"""Saving and restoring a run; loading what earlier stages trained."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_hgpt.checkpoint.choice import open_newest
from megatron_hgpt.checkpoint.description import FORMAT_VERSION, fingerprint
from megatron_hgpt.checkpoint.frozen_base import base_identity
from megatron_hgpt.checkpoint.publication import (
    bytes_on_disk,
    describe,
    folder_of,
    give_name,
    lacking_room,
    next_publication,
    prune,
    settle_leftovers,
)
from megatron_hgpt.checkpoint.random_states import layout, rng_chunks
from megatron_hgpt.checkpoint.restoring import Restored, restore
from megatron_hgpt.checkpoint.shards import Shard
from megatron_hgpt.checkpoint.snapshot import HostCopies, share_of
from megatron_hgpt.checkpoint.state import Chunk, model_chunks, model_state, optimizer_chunks, optimizer_steps
from megatron_hgpt.checkpoint.writer import Save, Verdict
from megatron_hgpt.config import RunConfig
from megatron_hgpt.engines.base import OptimizerState, TrainingEngine
from megatron_hgpt.errors import CheckpointError, ConfigError, HungError, reason_of
from megatron_hgpt.files import sync_folder
from megatron_hgpt.parameters import SAVED_GROUPS
from megatron_hgpt.rounding import file_size

if TYPE_CHECKING:
    from megatron_hgpt.model.healthgpt import HealthGPT

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that has just become complete."""

    path: Path
    num_bytes: int
    """Of its files; 0 on ranks that do not write the description."""
    save_time_s: float
    """From the start of the save until the folder got its name."""


class Checkpointer:
    """Saves and restores one run.

    A save copies what this rank writes into the host's memory, and a thread writes it. With `checkpoint.async_save`
    training goes on meanwhile, and `published` tells when the folder has its name; otherwise `save` waits for that.

    Args:
        config: the run; `checkpoint.directory` (or ``<output_dir>/checkpoints``) is where checkpoints go.
        trained_groups: groups that this stage or an earlier one it started from has trained.
        is_writer: True on the one process that describes and names the folders: the first.
    """

    def __init__(self, config: RunConfig, *, trained_groups: Sequence[str], is_writer: bool) -> None:
        self.config = config
        self.directory = Path(config.checkpoint.directory or Path(config.output_dir) / "checkpoints")
        self.trained_groups = sorted(set(trained_groups))
        self.is_writer = is_writer
        self._copies = HostCopies()
        self._under_way: tuple[Save[SavedCheckpoint], Path, float] | None = None
        """A save, the folder it is to become, and when it began."""
        self._num_saves = 0
        self._needed = 0
        """Bytes of one checkpoint on the disk, as far as `prepare` was asked."""
        self._ready: list[SavedCheckpoint] = []

    @functools.cached_property
    def _base(self) -> dict[str, str]:
        return base_identity(self.config)

    def prepare(self, models: Sequence[HealthGPT], engine: TrainingEngine) -> None:
        """See before any training that a checkpoint can be written; every rank must call it.

        Raises:
            ConfigError: the directory cannot be written to, or its disk has no room for one checkpoint.
        """
        with engine.whole_parameters():
            chunks = self._share(models, engine.optimizer_state())
        size = bytes_on_disk(sum(chunk.num_bytes for chunk in chunks), len(chunks))
        total = torch.tensor([size], dtype=torch.int64, device=torch.cuda.current_device())
        torch.distributed.all_reduce(total)
        self._needed = int(total)
        problem: list[str | None] = [None]
        if self.is_writer:
            try:
                problem = [lacking_room(self.directory, self._needed)]
            except OSError as error:
                problem = [reason_of(error)]
        torch.distributed.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise ConfigError(
                f"checkpoint.directory: no checkpoint can be written to {self.directory} ({problem[0]}); make room "
                "there, or name another disk"
            )

    def save(
        self,
        models: Sequence[HealthGPT],
        engine: TrainingEngine,
        *,
        step: int,
        loader_state: dict[str, Any],
        is_healthy: bool = True,
    ) -> None:
        """Write ``step_<step>``, or start to; every rank must call it. An earlier save that still writes is awaited.

        Args:
            models: the bare model parts of this pipeline stage.
            engine: holds the optimizer's state.
            step: optimizer steps completed.
            loader_state: where to go on in the data.
            is_healthy: whether it counts as one to go back to; the newest healthy one is never removed.

        Raises:
            CheckpointError: on every rank, where saving is not asynchronous: it could not be written.
            HungError: likewise, not within `timeouts.save_s`.
        """
        self._settle(wait=True)
        started_s = time.perf_counter()
        self._num_saves += 1
        final = folder_of(self.directory, step)
        temporary = final.with_name(f"{final.name}.{self._num_saves}.tmp")
        notes, info = {}, {}
        chunks: list[Chunk] | str
        try:
            with engine.whole_parameters():
                state = engine.optimizer_state()
                chunks = self._copies.take(self._share(models, state))
            notes = {"optimizer_steps": optimizer_steps(state)}
            info = self._describe(step, loader_state, is_healthy)
        except (OSError, RuntimeError, MemoryError) as error:
            chunks = f"no copy could be made ({reason_of(error) or type(error).__name__})"
        self._tell_of_memory()
        save = Save(
            folder=temporary,
            chunks=chunks,
            notes=notes,
            make=functools.partial(self._make, temporary),
            describe=functools.partial(self._describe_folder, temporary, info),
            publish=functools.partial(self._publish, temporary, final, started_s),
            deadline_s=self.config.timeouts.save_s,
        )
        save.start()
        self._under_way = (save, final, started_s)
        if not self.config.checkpoint.async_save:
            self._settle(wait=True, must_succeed=True)

    def published(self, *, wait: bool = False, is_final: bool = False) -> list[SavedCheckpoint]:
        """Checkpoints that became complete since the last call; every rank must call it.

        A save that failed, or takes longer than `timeouts.save_s`, is given up with a warning.

        Args:
            wait: until nothing is being written any more.
            is_final: training ends here, and what is not saved now is lost; waits too.

        Raises:
            CheckpointError: on every rank, where `is_final`: the save failed.
            HungError: likewise, it took longer than `timeouts.save_s`.
        """
        self._settle(wait=wait or is_final, must_succeed=is_final)
        ready, self._ready = self._ready, []
        return ready

    def _settle(self, *, wait: bool, must_succeed: bool = False) -> None:
        """Take note of what became of the save under way, if there is one and it is decided."""
        if self._under_way is None:
            return
        save, final, started_s = self._under_way
        verdict = save.wait() if wait else save.verdict()
        if verdict is Verdict.WRITING:
            return
        self._under_way = None
        if verdict is Verdict.PUBLISHED and not self.config.checkpoint.async_save:
            self._copies = HostCopies()  # training needs the memory more than the next save
        if verdict is Verdict.PUBLISHED:
            seconds = time.perf_counter() - started_s
            self._ready.append(save.published or SavedCheckpoint(path=final, num_bytes=0, save_time_s=seconds))
            return
        reason = save.give_up()
        # Its thread may still read from the copies.
        self._copies = HostCopies()
        text = f"cannot write a checkpoint to {self.directory} ({reason}); the newest complete one there is intact. "
        if must_succeed:
            told = [text + "Make room or mend the disk, and start again to resume from it"]
            torch.distributed.broadcast_object_list(told, src=0)
            # What did not come in time may do so at the next start; a full disk does not.
            raise (HungError if verdict is Verdict.OVERDUE else CheckpointError)(told[0])
        logger.warning("%sTraining goes on; the next save tries anew", text)

    def _share(self, models: Sequence[HealthGPT], state: OptimizerState) -> list[Chunk]:
        """What this rank writes."""
        from megatron.core import parallel_state

        tensors = model_state(models, SAVED_GROUPS)
        held = [*model_chunks(tensors), *optimizer_chunks(state, tensors), *rng_chunks()]
        return share_of(
            held,
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        )

    def _tell_of_memory(self) -> None:
        if self._num_saves == 1 and self.config.checkpoint.async_save:
            size = file_size(self._copies.num_bytes)
            logger.info("asynchronous saves: %s of the first rank's host memory hold what it writes", size)

    def _describe(self, step: int, loader_state: dict[str, Any], is_healthy: bool) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "stage": self.config.training.stage,
            "step": step,
            "is_healthy": is_healthy,
            "trained_groups": self.trained_groups,
            "loader": loader_state,
            "rng_layout": layout()[0],
            "fingerprint": fingerprint(self.config.model),
            "base": self._base,
        }

    def _make(self, temporary: Path) -> None:
        """The first rank's thread: an empty folder."""
        settle_leftovers(self.directory)
        if (problem := lacking_room(self.directory, self._needed)) is not None:
            raise CheckpointError(problem)
        temporary.mkdir()
        sync_folder(self.directory)

    def _describe_folder(
        self, temporary: Path, info: dict[str, Any], shards: list[Shard], notes: list[dict[str, Any]]
    ) -> int:
        """The first rank's thread: what the folder still lacks, after all ranks have written; returns its bytes."""
        steps: dict[str, int] = {}
        for name, count in (item for note in notes for item in note["optimizer_steps"].items()):
            steps[name] = max(steps.get(name, 0), count)
        number = next_publication(self.directory)
        info = {**info, "optimizer_steps": steps}
        return describe(temporary, info, self.config, shards, publication=number)

    def _publish(self, temporary: Path, final: Path, started_s: float, num_bytes: int) -> SavedCheckpoint:
        """The first rank's thread: give the folder its name."""
        give_name(temporary, final)
        try:
            prune(self.directory, self.config.checkpoint.keep_last)
        except Exception as error:  # the checkpoint is there whatever becomes of others
            logger.warning("earlier checkpoints in %s stay: %s", self.directory, reason_of(error))
        seconds = time.perf_counter() - started_s
        return SavedCheckpoint(path=final, num_bytes=num_bytes, save_time_s=seconds)

    def restore_latest(
        self, models: Sequence[HealthGPT], engine: TrainingEngine, *, healthy_only: bool = False
    ) -> Restored | None:
        """Load the newest whole checkpoint of this run in place; None when there is none. Every rank must call it.

        Args:
            models: the bare model parts of this pipeline stage.
            engine: holds the optimizer's state.
            healthy_only: leave out checkpoints that were saved right after a loss spike.

        Raises:
            CheckpointError: it belongs to another model, base or stage, or all checkpoints are damaged.
        """
        if self.is_writer:
            settle_leftovers(self.directory)
        opened = open_newest(self.directory, healthy_only=healthy_only)
        return None if opened is None else restore(opened, self.config, self._base, models, engine)
