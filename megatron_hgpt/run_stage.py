"""main(config): build everything of one stage in order, fit, close."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_hgpt import distributed
from megatron_hgpt.backbone.implementation import describe_choice, sequence_multiple
from megatron_hgpt.batching import global_batch_size, repetition_warning
from megatron_hgpt.config import RunConfig
from megatron_hgpt.environment import rank_from_environment, world_size_from_environment
from megatron_hgpt.errors import ConfigError, reason_of
from megatron_hgpt.hooks import PathParameters, SampleImages, WatchdogHook
from megatron_hgpt.model.parameter_counts import count_parameters, count_trained
from megatron_hgpt.ownership import FolderOwner
from megatron_hgpt.stages import resolve_stage
from megatron_hgpt.validation import validate

if TYPE_CHECKING:
    from megatron_hgpt.data.loader import TrainLoader
    from megatron_hgpt.data.validation_loader import ValidationLoader
    from megatron_hgpt.distributed import DistributedContext
    from megatron_hgpt.model.healthgpt import HealthGPT
    from megatron_hgpt.text.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)


def main(config: RunConfig) -> int:
    """Train one stage from configuration to last checkpoint.

    Order: validate, process groups, model (weights loaded), earlier stages' weights, freeze, data, trainer, fit.

    Returns:
        0, or the number of the signal (SIGTERM, SIGINT) that stopped the run before its last step; it has saved.

    Raises:
        ConfigError, CheckpointError, DataError: bad input, before any training work is lost.
    """
    validate(config, world_size_from_environment())
    stage = resolve_stage(config.training)
    watchdog = _watchdog(config)
    watchdog.start()
    owned = contextlib.ExitStack()
    try:
        context = distributed.initialize(config.parallel, config.training.seed, config.timeouts.collective_s)
        watchdog.connect(distributed.store_of_its_own())
        if not context.is_writer:
            logging.getLogger("megatron_hgpt").setLevel(logging.ERROR)
        # Here and not at the top: the import-order rule of `cpu_platform`.
        from megatron_hgpt.build import build_model_chunks, freeze_except
        from megatron_hgpt.checkpoint import Checkpointer, load_weights
        from megatron_hgpt.data.loader import build_loader
        from megatron_hgpt.data.validation_loader import build_validation_loader
        from megatron_hgpt.hooks import build_hooks
        from megatron_hgpt.text.tokenizer import TextTokenizer
        from megatron_hgpt.trainer import Trainer

        _own_folders(config, context, owned)
        # With cached features only the sample pictures, drawn from pixels, still need the tower.
        with_tower = config.data.feature_cache is None or (_draws_samples(config) and context.pp_size == 1)
        models = build_model_chunks(config, context.device, dropout=dict(stage.dropout), with_tower=with_tower)
        trained = load_weights(models, config, config.checkpoint.init_from)
        freeze_except(models, stage.trainable)
        tokenizer = TextTokenizer.load(str(config.model.tokenizer or config.model.backbone))
        fitting = {
            "tokenizer_hash": tokenizer.hash,
            "num_image_tokens": config.model.vision.num_image_tokens,
            "image_size": config.model.vision.hf_config["image_size"],
            "dp_rank": context.dp_rank,
            "dp_size": context.dp_size,
            "tasks": stage.tasks,
            "pad_to_multiple": sequence_multiple(config.parallel, config.training),
        }
        loader = build_loader(config, global_batch_size=global_batch_size(config), **fitting)
        validation = build_validation_loader(config, **fitting)
        total_steps = config.training.num_steps or max(
            1, round((config.training.num_epochs or 1) * loader.steps_per_epoch)
        )
        _log_header(config, context, loader=loader, validation=validation, total_steps=total_steps)
        if warning := repetition_warning(config, loader.epoch_size):
            logger.warning("%s", warning)
        checkpointer = Checkpointer(config, trained_groups=[*trained, *stage.trainable], is_writer=context.is_writer)
        hooks = build_hooks(
            config,
            world_size=context.world_size,
            watchdog=watchdog,
            parameters=_path_parameters(config),
            sample_images=_image_sampler(config, models[0], tokenizer, context),
        )
        return Trainer(
            config=config,
            stage=stage,
            context=context,
            models=models,
            loader=loader,
            total_steps=total_steps,
            checkpointer=checkpointer,
            hooks=hooks,
            validation=validation,
        ).fit()
    finally:
        owned.close()
        distributed.shutdown()
        watchdog.stop()


def _watchdog(config: RunConfig) -> WatchdogHook:
    """Of this process, before there is a process group."""
    rank, world_size = rank_from_environment(), world_size_from_environment()
    return WatchdogHook(config.timeouts, rank=rank, world_size=world_size, output_dir=Path(config.output_dir))


def _log_header(
    config: RunConfig,
    context: DistributedContext,
    *,
    loader: TrainLoader,
    validation: ValidationLoader | None,
    total_steps: int,
) -> None:
    """What will run."""
    from megatron_hgpt.hooks.header import header_lines

    for line in header_lines(
        config,
        context,
        layers=describe_choice(config.model, config.training),
        parameters=count_parameters(config.model),
        trained=count_trained(config.model, resolve_stage(config.training).trainable),
        total_steps=total_steps,
        loader=loader,
        validation=validation,
    ):
        logger.info("%s", line)


def _own_folders(config: RunConfig, context: DistributedContext, owned: contextlib.ExitStack) -> None:
    """The first rank takes what no other run may write at the same time; the others wait for its word.

    Raises:
        ConfigError: on every rank; a run that is alive owns one, or it cannot be written.
    """
    refusal: list[str | None] = [None]
    if context.is_writer:
        folders = {"output_dir": config.output_dir, "checkpoint.directory": config.checkpoint.directory}
        owners = {Path(folder).resolve(): option for option, folder in folders.items() if folder is not None}
        for folder, option in owners.items():
            try:
                owned.enter_context(FolderOwner(folder))
            except ConfigError as error:
                refusal = [str(error)]
                break
            except OSError as error:  # for instance a full disk, which shows with the first byte only
                reason = reason_of(error)
                refusal = [f"{option}={folders[option]} cannot be written ({reason}); make room, or name another place"]
                break
    torch.distributed.broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise ConfigError(refusal[0])


def _path_parameters(config: RunConfig) -> PathParameters:
    """Parameters that a token passes, for the 4N rule: layers, plugins and head; the embedding table does not count."""
    stage = resolve_stage(config.training)
    counts = count_parameters(config.model)
    on_path = {name: counts[name] for name in ("backbone", "head")}
    on_path.update({name: count for name, count in counts.items() if name.startswith("hlora_")})
    trained = sum(
        count
        for name, count in on_path.items()
        if name in stage.trainable or (name == "head" and {"vocabulary", "new_rows"} & set(stage.trainable))
    )
    return PathParameters(num_frozen=sum(on_path.values()) - trained, num_trained=trained)


def _draws_samples(config: RunConfig) -> bool:
    return config.logging.sample_images_interval_steps > 0 and bool(config.model.vq.path)


def _image_sampler(
    config: RunConfig, model: HealthGPT, tokenizer: TextTokenizer, context: DistributedContext
) -> SampleImages | None:
    """Draws the first held-out (or training) generation prompts; None where the run cannot decode images."""
    from megatron_hgpt.inference.sample_images import image_sampler

    if not _draws_samples(config):
        return None
    if context.pp_size > 1 or context.cp_size > 1:
        logger.warning(
            "sample images need the whole model and sequence on every rank and are off with pipeline or context "
            "parallelism; hgpt generate draws from any checkpoint of this run"
        )
        return None
    return image_sampler(config, model, tokenizer, context)
