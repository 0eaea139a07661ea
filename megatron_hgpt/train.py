"""main(config): build everything of one stage in order, fit, close."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_hgpt import distributed
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import save_config
from megatron_hgpt.stages import resolve_stage
from megatron_hgpt.validation import global_batch_size, validate

logger = logging.getLogger(__name__)


def main(config: RunConfig) -> None:
    """Train one stage from configuration to last checkpoint.

    Order: validate, process groups, model (weights loaded), earlier stages' weights, freeze, data, trainer, fit.

    Raises:
        ConfigError, CheckpointError, DataError: bad input, before any training work is lost.
    """
    validate(config, distributed.world_size_from_environment())
    stage = resolve_stage(config.training)
    context = distributed.initialize(config.parallel, config.training.seed)
    _configure_logging(context.is_writer)
    try:
        # megatron.core is imported below only: the platform had to be prepared first.
        from megatron_hgpt.checkpoint import Checkpointer, load_weights
        from megatron_hgpt.data.loader import build_loader
        from megatron_hgpt.data.tokenizer import TextTokenizer
        from megatron_hgpt.hooks import build_hooks
        from megatron_hgpt.model.healthgpt import build_model, freeze_except
        from megatron_hgpt.trainer import Trainer

        if context.is_writer:
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
            save_config(config, Path(config.output_dir) / "resolved_config.yaml")
        model = build_model(config, context.device, dropout=dict(stage.dropout))
        trained = load_weights(model, config, config.checkpoint.init_from)
        trainable = freeze_except(model, stage.trainable)
        tokenizer = TextTokenizer.load(config.model.tokenizer or config.model.backbone)
        global_batch_size = config.training.global_batch_size or stage.global_batch_size
        loader = build_loader(
            config,
            tokenizer_hash=tokenizer.hash,
            num_image_tokens=model.tower.num_image_tokens,
            image_size=model.tower.image_size,
            dp_rank=context.dp_rank,
            dp_size=context.dp_size,
            tasks=stage.tasks,
            global_batch_size=global_batch_size,
            pad_to_multiple=context.tp_size if config.parallel.sequence_parallel else 1,
        )
        total_steps = config.training.num_steps or round((config.training.num_epochs or 1) * loader.steps_per_epoch)
        if context.is_writer:
            logger.info(
                "%s: %d steps of %d samples; %d trainable tensors in %s",
                config.training.stage,
                total_steps,
                global_batch_size,
                len(trainable),
                ", ".join(stage.trainable),
            )
        checkpointer = Checkpointer(
            config, trained_groups=[*trained, *stage.trainable], is_writer=context.is_writer
        )
        hooks = build_hooks(config, model=model, context=context, tokenizer=tokenizer)
        Trainer(
            config=config,
            stage=stage,
            context=context,
            model=model,
            loader=loader,
            total_steps=total_steps,
            checkpointer=checkpointer,
            hooks=hooks,
        ).fit()
    finally:
        distributed.shutdown()


def _configure_logging(is_writer: bool) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_hgpt").setLevel(logging.INFO if is_writer else logging.WARNING)
