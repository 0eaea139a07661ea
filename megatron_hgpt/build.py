"""From a configuration to a model with weights: the parts of this pipeline stage, initialised, loaded, frozen."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from megatron.core import parallel_state

from megatron_hgpt.backbone.shape import read_backbone
from megatron_hgpt.backbone.transformer import transformer_config
from megatron_hgpt.config import HLoRAPluginConfig, RunConfig
from megatron_hgpt.convert.huggingface import load_backbone
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.model.healthgpt import HealthGPT
from megatron_hgpt.model.initialization import initialize_by_name
from megatron_hgpt.parameters import group_of, parameter_groups
from megatron_hgpt.samples import TASKS, Task

logger = logging.getLogger(__name__)


def plugins_of(config: RunConfig, dropout: dict[Task, float | None] | None = None) -> dict[Task, HLoRAPluginConfig]:
    """The configured plugins by task, with a stage's dropout in place of the plugin's own where it sets one."""
    plugins = {}
    for task in TASKS:
        plugin = config.model.hlora.of(task)
        if plugin is None:
            continue
        override = (dropout or {}).get(task)
        plugins[task] = plugin if override is None else dataclasses.replace(plugin, dropout=override)
    return plugins


def build_model(
    config: RunConfig, device: torch.device, *, dropout: dict[Task, float | None] | None = None
) -> HealthGPT:
    """The whole HealthGPT in one piece (a layout without pipeline stages); see `build_model_chunks`."""
    (model,) = build_model_chunks(config, device, dropout=dropout)
    return model


def build_model_chunks(
    config: RunConfig,
    device: torch.device,
    *,
    dropout: dict[Task, float | None] | None = None,
    with_tower: bool = True,
) -> list[HealthGPT]:
    """This pipeline stage's part of a HealthGPT, initialised (by name) and, where folders are given, loaded.

    Args:
        config: the run's configuration.
        device: where parameters live.
        dropout: H-LoRA dropout per task that overrides the plugins' own (a stage's choice).
        with_tower: False leaves the tower out: micro-batches carry features from the cache.

    Returns:
        One model, or one per virtual pipeline stage.

    Raises:
        ConfigError: sizes that do not fit each other or the layout.
        CheckpointError: a weight folder that does not fit the configuration.
    """
    chunks = bare_model_chunks(config, device, dropout=dropout, with_tower=with_tower)
    for model in chunks:
        _fill(model, config)
    if config.model.backbone is None:
        logger.warning("model.backbone is not set: the language model starts from random weights")
    return [model.to(device) for model in chunks]


def bare_model_chunks(
    config: RunConfig,
    device: torch.device,
    *,
    dropout: dict[Task, float | None] | None = None,
    with_tower: bool = True,
) -> list[HealthGPT]:
    """As `build_model_chunks`, with weights undefined: on torch's meta device it costs nothing."""
    shape = read_backbone(config.model.hf_config)
    transformer = transformer_config(shape, config.model, config.parallel, config.training)
    num_chunks = config.parallel.virtual_pipeline_model_parallel_size
    return [
        HealthGPT(
            config,
            transformer,
            shape,
            plugins_of(config, dropout),
            device,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
            with_tower=with_tower,
        )
        for vp_stage in ([None] if num_chunks is None else range(num_chunks))
    ]


def _fill(model: HealthGPT, config: RunConfig) -> None:
    """Draw the weights of what is new and load the backbone where the configuration names its folder."""
    initialize_by_name(model, seed=config.training.seed, include_backbone=config.model.backbone is None)
    if config.model.backbone is not None:
        load_backbone(
            model.language_model,
            config.model.backbone,
            model.shape,
            model.vocabulary,
            tp_rank=model.pg_tp.rank(),
            tp_size=model.pg_tp.size(),
            layer_offset=model.layer_offset,
        )


def freeze_except(models: Sequence[HealthGPT], trainable: Sequence[str]) -> list[str]:
    """Set requires_grad by group BEFORE Megatron's DDP wraps the model, which collects parameters once.

    Args:
        models: the bare parts of this pipeline stage.
        trainable: groups of `megatron_hgpt.stages`; new_rows trains embedding and head through a row mask.

    Returns:
        Names of the trainable parameters on this rank; a pipeline stage may have none.

    Raises:
        ConfigError: a group that matches no parameter on any rank would train nothing.
    """
    wanted = parameter_groups(trainable)
    names, found = [], set()
    for model in models:
        for name, parameter in model.named_parameters():
            group = group_of(name)
            parameter.requires_grad_(group in wanted)
            if group in wanted:
                names.append(name)
                found.add(group)
        if "new_rows" in trainable:
            _train_new_rows_only(model)
    if missing := wanted - _on_any_stage(found):
        raise ConfigError(f"nothing to train in {sorted(missing)}: the model has no such parameters")
    return names


def _on_any_stage(groups: set[str]) -> set[str]:
    """The union of `groups` over the pipeline stages."""
    found: list[set[str]] = [set()] * parallel_state.get_pipeline_model_parallel_world_size()  # each to be replaced
    torch.distributed.all_gather_object(found, groups, group=parallel_state.get_pipeline_model_parallel_group())
    return set().union(*found)


def _train_new_rows_only(model: HealthGPT) -> None:
    vocabulary, rank = model.vocabulary, model.pg_tp.rank()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("word_embeddings.weight" in name or "output_layer.weight" in name):
            rows = torch.arange(parameter.shape[0], device=parameter.device) + rank * parameter.shape[0]
            mask = ((rows >= vocabulary.text_size) & (rows < vocabulary.size)).unsqueeze(1)
            parameter.register_hook(lambda grad, mask=mask: grad * mask)
