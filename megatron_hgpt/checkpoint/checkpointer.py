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

from megatron_hgpt.checkpoint.description import (
    FORMAT_VERSION,
    INFO,
    check_fits,
    checkpoint_folders,
    fingerprint,
    read_info,
    resolve_folder,
)
from megatron_hgpt.checkpoint.differences import changed_settings
from megatron_hgpt.checkpoint.frozen_base import base_identity
from megatron_hgpt.checkpoint.state import (
    by_parameter,
    copy_tensors,
    model_state,
    optimizer_tensors,
    restore_rng,
    rng_object,
    steps_per_group,
)
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import save_config
from megatron_hgpt.engines.base import TrainingEngine
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.parameters import SAVED_GROUPS, parameter_groups

if TYPE_CHECKING:
    from megatron_hgpt.model.healthgpt import HealthGPT

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Restored:
    """What a resumed run continues from."""

    path: Path
    step: int
    """Optimizer steps completed."""
    loader_state: dict[str, Any]
    changes: list[str]
    """What the configuration says now, and said when the checkpoint was written: one text per setting."""


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
            models, engine: what is saved.
            step: optimizer steps completed.
            loader_state: the loader's position.
            is_healthy: False where the last step was an abnormal one (`anomaly.AnomalyGuard.is_healthy`).

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
            info = self._describe(step, loader_state, steps_per_group(state)) | {"is_healthy": is_healthy}
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
            "format_version": FORMAT_VERSION,
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
            folders = checkpoint_folders(self.directory)
            healthy = [folder for folder in folders if read_info(folder).get("is_healthy", True)]
            for old in folders[:-keep] if keep > 0 else []:
                if old not in healthy[-1:]:
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
        self, models: Sequence[HealthGPT], engine: TrainingEngine, healthy_only: bool = False
    ) -> Restored | None:
        """Load the newest complete checkpoint of this run in place; None when there is none.

        Args:
            models, engine: what is loaded into.
            healthy_only: leave out those that were saved after an abnormal step.

        Raises:
            CheckpointError: it belongs to another model, base or stage.
        """
        folders = checkpoint_folders(self.directory)
        if healthy_only:
            folders = [folder for folder in folders if read_info(folder).get("is_healthy", True)]
        if not folders:
            return None
        folder = folders[-1]
        info = read_info(folder)
        check_fits(self.config, self._base, folder, info)
        if info["stage"] != self.config.training.stage:
            raise CheckpointError(
                f"{folder} is of {info['stage']}, this run trains {self.config.training.stage}: give each stage its "
                "output_dir and name the earlier stage's checkpoint in checkpoint.init_from"
            )
        rng = rng_object()
        same_layout = list(rng.global_shape) == info["rng_layout"]
        if not same_layout:
            before, now = _layout(info["rng_layout"]), _layout(rng.global_shape)
            logger.warning("%s was saved at %s and goes on at %s: dropout draws anew", folder, before, now)
        with engine.whole_parameters(writable=True):
            tensors, state = model_state(models, SAVED_GROUPS), engine.optimizer_state()
            request: dict[str, Any] = {"model": tensors, "optimizer": optimizer_tensors(state, tensors)}
            loaded = _load({**request, "rng": rng} if same_layout else request, folder)
            copy_tensors(models, loaded["model"])
            state.scatter(by_parameter(loaded["optimizer"]))
        for group in state.groups:
            group["step"] = info["optimizer_steps"][group["group"]]
        if same_layout:
            restore_rng(loaded["rng"])
        changes = changed_settings(folder, self.config)
        return Restored(path=folder, step=info["step"], loader_state=info["loader"], changes=changes)


def _layout(sizes: Sequence[int]) -> str:
    """The sizes of `rng_object` by name."""
    pipeline, tensor, data = sizes
    return f"pipeline {pipeline} x tensor {tensor} x data and context {data}"


def _save_strategy() -> Any:
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    # One writer per rank: adapter checkpoints are small, and each writer is a process to start.
    return TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)


def _load(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load what `request` describes, after comparing its set of tensors with the folder's.

    Raises:
        CheckpointError: tensors are missing.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    present = dist_checkpointing.load_tensors_metadata(str(folder))
    wanted = {value.key for value in nested_values(request) if isinstance(value, ShardedTensor)}
    missing = sorted(wanted - set(present))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of the model, e.g. {missing[:3]}")
    with torch.no_grad():
        return dist_checkpointing.load(request, str(folder))


def load_weights(models: Sequence[HealthGPT], config: RunConfig, folders: Sequence[str]) -> list[str]:
    """Load the weights that earlier stages trained, in order, into a model that is not yet wrapped.

    Of each folder only the groups it (or a stage before it) trained are taken, so that stage-1 comprehension and
    stage-1 generation, trained apart, add up.

    Args:
        models: the bare model parts of this pipeline stage.
        config: the run.
        folders: checkpoint folders, or run folders whose newest checkpoint is meant.

    Returns:
        The groups trained so far.

    Raises:
        CheckpointError: a folder that is no checkpoint, or of another model or base.
    """
    trained: set[str] = set()
    base = base_identity(config) if folders else {}
    for name in folders:
        folder = resolve_folder(Path(name))
        info = read_info(folder)
        check_fits(config, base, folder, info)
        groups = parameter_groups(info["trained_groups"])
        copy_tensors(models, _load({"model": model_state(models, sorted(groups))}, folder)["model"])
        trained |= set(info["trained_groups"])
        logger.info("loaded %s (%s, step %d): %s", folder, info["stage"], info["step"], ", ".join(sorted(groups)))
    return sorted(trained)
