"""Saving and restoring a run; loading what earlier stages trained."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_hgpt.checkpoint.choice import open_newest
from megatron_hgpt.checkpoint.description import INFO, checkpoint_folders, fingerprint
from megatron_hgpt.checkpoint.frozen_base import base_identity
from megatron_hgpt.checkpoint.restoring import Restored, restore
from megatron_hgpt.checkpoint.state import model_state, optimizer_tensors, rng_object, steps_per_group
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import save_config
from megatron_hgpt.engines.base import TrainingEngine
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.parameters import SAVED_GROUPS

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

    With `checkpoint.async_save`, `save` returns once a forked process holds the tensors; training goes on while it
    writes, and `published` makes the folder appear under its name when all ranks have written.

    Args:
        config: the run; `checkpoint.directory` (or ``<output_dir>/checkpoints``) is where checkpoints go.
        trained_groups: groups that this stage or an earlier one it started from has trained.
        is_writer: True on the one process that writes the description and renames.
    """

    def __init__(self, config: RunConfig, *, trained_groups: Sequence[str], is_writer: bool) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.config = config
        self.directory = Path(config.checkpoint.directory or Path(config.output_dir) / "checkpoints")
        self.trained_groups = sorted(set(trained_groups))
        self.is_writer = is_writer
        self._queue = AsyncCallsQueue()
        self._ready: list[SavedCheckpoint] = []

    @functools.cached_property
    def _base(self) -> dict[str, str]:
        return base_identity(self.config)

    def save(
        self, models: Sequence[HealthGPT], engine: TrainingEngine, *, step: int, loader_state: dict[str, Any]
    ) -> None:
        """Write ``step_<step>``, or start to; every rank must call it. An earlier save that still writes is awaited.

        Raises:
            CheckpointError: a file of this or the earlier save could not be written.
        """
        from megatron.core import dist_checkpointing

        self._finish_writes(wait=True)
        started_s = time.perf_counter()
        final = self.directory / f"step_{step:08d}"
        temporary = final.with_name(final.name + ".tmp")
        if self.is_writer:
            self._clear_unfinished()
            temporary.mkdir(parents=True)
        torch.distributed.barrier()
        is_async = self.config.checkpoint.async_save
        with engine.whole_parameters():
            tensors, state = model_state(models, SAVED_GROUPS), engine.optimizer_state()
            info = self._describe(step, loader_state, steps_per_group(state))
            with self._write_errors():
                request = dist_checkpointing.save(
                    {"model": tensors, "optimizer": optimizer_tensors(state, tensors), "rng": rng_object()},
                    str(temporary),
                    sharded_strategy=_save_strategy(),
                    async_sharded_save=is_async,
                )
            publish = functools.partial(self._publish, temporary, final, info, started_s)
            if request is not None:
                request.add_finalize_fn(publish)
                self._queue.schedule_async_request(request)
        if not is_async:
            publish()

    def published(self, *, wait: bool = False) -> list[SavedCheckpoint]:
        """Checkpoints that became complete since the last call; every rank must call it.

        Args:
            wait: until nothing is being written any more.

        Raises:
            CheckpointError: a file could not be written; every rank raises it.
        """
        self._finish_writes(wait=wait)
        ready, self._ready = self._ready, []
        return ready

    def _finish_writes(self, *, wait: bool) -> None:
        with self._write_errors():
            self._queue.maybe_finalize_async_calls(blocking=wait)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Megatron's error of a failed write, which is no `Exception`, as one of ours."""
        from torch.distributed.checkpoint import CheckpointException

        try:
            yield
        except CheckpointException as error:
            reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            reasons = reasons or "the first rank says why"
            raise CheckpointError(
                f"cannot write a checkpoint to {self.directory} ({reasons}); the newest complete one there is intact. "
                "Make room or mend the disk, and start again to resume from it"
            ) from error

    def _describe(self, step: int, loader_state: dict[str, Any], optimizer_steps: dict[str, int]) -> dict[str, Any]:
        return {
            "format_version": 2,
            "stage": self.config.training.stage,
            "step": step,
            "trained_groups": self.trained_groups,
            "optimizer_steps": optimizer_steps,
            "loader": loader_state,
            "rng_layout": list(rng_object().global_shape),
            "fingerprint": fingerprint(self.config.model),
            "base": self._base,
        }

    def _publish(self, temporary: Path, final: Path, info: dict[str, Any], started_s: float) -> None:
        """Describe the folder and give it its name, after all ranks have written."""
        torch.distributed.barrier()
        num_bytes = 0
        if self.is_writer:
            save_config(self.config, temporary / "resolved_config.yaml")
            (temporary / INFO).write_text(json.dumps(info, indent=1))
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            num_bytes = sum(file.stat().st_size for file in final.iterdir())
            keep = self.config.checkpoint.keep_last
            for old in checkpoint_folders(self.directory)[:-keep] if keep > 0 else []:
                shutil.rmtree(old)
        torch.distributed.barrier()
        seconds = time.perf_counter() - started_s
        self._ready.append(SavedCheckpoint(path=final, num_bytes=num_bytes, save_time_s=seconds))

    def _clear_unfinished(self) -> None:
        """Remove what a killed run left half written."""
        for path in self.directory.glob("step_*.tmp") if self.directory.is_dir() else ():
            if re.fullmatch(r"step_\d{8}\.tmp", path.name):
                logger.warning("removing %s, which an interrupted save left unfinished", path)
                shutil.rmtree(path)

    def restore_latest(
        self, models: Sequence[HealthGPT], engine: TrainingEngine, *, healthy_only: bool = False
    ) -> Restored | None:
        """Load the newest whole checkpoint of this run in place; None when there is none. Every rank must call it.

        Args:
            models: the bare model parts of this pipeline stage.
            engine: holds the optimizer's state.
            healthy_only: leave out checkpoints that were saved after an anomaly.

        Raises:
            CheckpointError: it belongs to another model, base or stage, or all checkpoints are damaged.
        """
        opened = open_newest(self.directory, healthy_only=healthy_only)
        return None if opened is None else restore(opened, self.config, self._base, models, engine)


def _save_strategy() -> Any:
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    # One writer per rank: adapter checkpoints are small, and each writer is a process to start.
    return TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
