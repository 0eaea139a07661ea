"""A checkpoint into a run that goes on, or its weights into a later stage or into inference."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hgpt.checkpoint.agreement import on_every_rank
from megatron_hgpt.checkpoint.choice import OpenCheckpoint, open_checkpoint
from megatron_hgpt.checkpoint.description import check_fits
from megatron_hgpt.checkpoint.differences import changed_settings
from megatron_hgpt.checkpoint.frozen_base import base_identity
from megatron_hgpt.checkpoint.random_states import restore_random_states
from megatron_hgpt.checkpoint.reading import pieces_of, read_pieces
from megatron_hgpt.checkpoint.state import copy_tensors, model_chunks, model_state, optimizer_chunks
from megatron_hgpt.config import RunConfig
from megatron_hgpt.engines.base import OptimizerState, TrainingEngine
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.parameters import SAVED_GROUPS, parameter_groups
from megatron_hgpt.stages import resolve_stage

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


def restore(
    opened: OpenCheckpoint,
    config: RunConfig,
    base: dict[str, str],
    models: Sequence[HealthGPT],
    engine: TrainingEngine,
) -> Restored:
    """Load a checkpoint of this run in place; every rank must call it.

    Args:
        opened: the checkpoint.
        config: the run.
        base: `base_identity` of the run.
        models: the bare model parts of this pipeline stage.
        engine: holds the optimizer's state.

    Raises:
        CheckpointError: it belongs to another model, base or stage, trained other parameters, or cannot be read.
    """
    folder, info = opened.folder, opened.info
    check_fits(config, base, folder, info)
    _check_stage(config, folder, info)
    with engine.whole_parameters(writable=True):
        tensors, state = model_state(models, SAVED_GROUPS), engine.optimizer_state()
        pieces = pieces_of([*model_chunks(tensors), *optimizer_chunks(state, tensors)])
        on_every_rank(lambda: read_pieces(folder, opened.contents, pieces))
        copy_tensors(models, {name: tensor.data for name, tensor in tensors.items()})
        state.restored()
    _restore_steps(state, info)
    on_every_rank(lambda: restore_random_states(folder, info, opened.contents, config.training.seed))
    changes = changed_settings(folder, config)
    return Restored(path=folder, step=info["step"], loader_state=info["loader"], changes=changes)


def _check_stage(config: RunConfig, folder: Path, info: dict[str, Any]) -> None:
    """Compare the stage, and the groups of parameters that a stage's options decide."""
    if info["stage"] != config.training.stage:
        raise CheckpointError(
            f"{folder} is of {info['stage']}, this run trains {config.training.stage}: give each stage its "
            "output_dir and name the earlier stage's checkpoint in checkpoint.init_from"
        )
    training = config.training
    now, before = sorted(resolve_stage(training).trainable), sorted(info["optimizer_steps"])
    if now != before:
        raise CheckpointError(
            f"{folder} trained {', '.join(before) or 'nothing'}, this run trains {', '.join(now)} (training.new_rows="
            f"{training.new_rows}, train_adapters_in_stage2={str(training.train_adapters_in_stage2).lower()}): set "
            "them as in resolved_config.yaml there, or give the run another output_dir and name this folder in "
            "checkpoint.init_from"
        )


def _restore_steps(state: OptimizerState, info: dict[str, Any]) -> None:
    for group in state.groups:
        group["step"] = info["optimizer_steps"][group["group"]]


def load_weights(models: Sequence[HealthGPT], config: RunConfig, folders: Sequence[str]) -> list[str]:
    """Load the weights that earlier stages trained, in order, into a model that is not yet wrapped.

    Of each folder only the groups it (or a stage before it) trained are taken, so that stage-1 comprehension and
    stage-1 generation, trained apart, add up. Every rank must call it.

    Args:
        models: the bare model parts of this pipeline stage.
        config: the run.
        folders: checkpoint folders, or run folders whose newest whole checkpoint is meant.

    Returns:
        The groups trained so far.

    Raises:
        CheckpointError: a folder that is no checkpoint, is damaged, or is of another model or base.
    """
    return load_opened(models, config, [open_checkpoint(Path(name)) for name in folders])


def load_opened(models: Sequence[HealthGPT], config: RunConfig, checkpoints: Sequence[OpenCheckpoint]) -> list[str]:
    """`load_weights` of checkpoints that are open already."""
    trained: set[str] = set()
    base = base_identity(config) if checkpoints else {}
    for opened in checkpoints:
        folder, info = opened.folder, opened.info
        check_fits(config, base, folder, info)
        groups = parameter_groups(info["trained_groups"])
        tensors = model_state(models, sorted(groups))
        pieces = pieces_of(model_chunks(tensors))
        on_every_rank(lambda: read_pieces(folder, opened.contents, pieces))  # noqa: B023  (called here)
        copy_tensors(models, {name: tensor.data for name, tensor in tensors.items()})
        trained |= set(info["trained_groups"])
        logger.info("loaded %s (%s, step %d): %s", folder, info["stage"], info["step"], ", ".join(sorted(groups)))
    return sorted(trained)
