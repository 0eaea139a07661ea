"""A trainer of a small model, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_hgpt.testing.models import FixedLoader, make_b_nonzero

if TYPE_CHECKING:
    from megatron_hgpt.config import RunConfig
    from megatron_hgpt.distributed import DistributedContext
    from megatron_hgpt.hooks.base import Hook
    from megatron_hgpt.trainer import Trainer


def build_trainer(
    config: RunConfig,
    context: DistributedContext,
    *,
    total_steps: int | None = None,
    packing: str = "none",
    loader_class: type[FixedLoader] = FixedLoader,
    num_micro_batches: int = 4,
    hooks: Sequence[Hook] = (),
) -> Trainer:
    """A trainer of `config`'s stage on named micro-batches, with the stage's dropout and non-zero B.

    Args:
        config: the run; its `training.num_steps` must be set.
        context: of the process group that is already initialised.
        total_steps: other than `training.num_steps`.
        packing: as `FixedLoader` takes it.
        loader_class: another loader than the default one.
        num_micro_batches: per step, over all data-parallel ranks.
        hooks: of the trainer.
    """
    from megatron_hgpt.backbone.implementation import sequence_multiple
    from megatron_hgpt.build import build_model_chunks, freeze_except
    from megatron_hgpt.checkpoint import Checkpointer
    from megatron_hgpt.stages import resolve_stage
    from megatron_hgpt.trainer import Trainer

    stage = resolve_stage(config.training)
    models = build_model_chunks(config, context.device, dropout=dict(stage.dropout))
    for model in models:
        make_b_nonzero(model)
    freeze_except(models, stage.trainable)
    loader = loader_class(
        stage.tasks,
        num_micro_batches=num_micro_batches,
        dp_rank=context.dp_rank,
        dp_size=context.dp_size,
        packing=packing,
        pad_to_multiple=sequence_multiple(config.parallel, config.training),
    )
    return Trainer(
        config=config,
        stage=stage,
        context=context,
        models=models,
        loader=loader,
        total_steps=total_steps or int(config.training.num_steps or 0),
        checkpointer=Checkpointer(config, trained_groups=stage.trainable, is_writer=context.is_writer),
        hooks=hooks,
    )
