"""From a run's configuration to Megatron's TransformerConfig: the one place where it is made."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_hgpt import cpu_platform
from megatron_hgpt.backbone.implementation import keeps_bf16_parameters, transformer_settings
from megatron_hgpt.backbone.shape import BackboneShape, check_tensor_parallel
from megatron_hgpt.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_hgpt.errors import ConfigError, did_you_mean, shown

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

_RECOMPUTE: dict[str | None, dict[str, Any]] = {
    None: {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}


def transformer_config(
    shape: BackboneShape, model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig
) -> TransformerConfig:
    """Megatron's configuration of the backbone.

    Raises:
        ConfigError: a tensor-parallel size that does not fit, a name in `model.transformer_overrides` that is unknown
            or decided elsewhere, or a combination that Megatron refuses.
    """
    on_cpu = cpu_platform.install_if_needed()
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    check_tensor_parallel(shape, parallel.tensor_model_parallel_size)
    check_override_names("model.transformer_overrides", model.transformer_overrides, TransformerConfig)
    dtype = torch.bfloat16 if keeps_bf16_parameters(training) else torch.float32
    # What other sections decide; an override of these would run a slightly different model, or none.
    decided: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.rms_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": keeps_bf16_parameters(training),
        **transformer_settings(model, training),
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        # A batched exchange would mix up the two messages between the same two interleaved stages.
        "overlap_p2p_comm": parallel.virtual_pipeline_model_parallel_size is not None,
        "batch_p2p_comm": parallel.virtual_pipeline_model_parallel_size is None,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1,
        "moe_token_dispatcher_type": "alltoall",  # no experts here; the default one refuses variable lengths
        # Gradients are sums over tokens, divided once by the tokens of the global batch.
        "calculate_per_token_loss": True,
        "window_size": None,
    }
    if shape.sliding_window is not None and shape.sliding_window < model.max_seq_length:
        # Hugging Face counts the position itself, Megatron the positions to its left.
        decided["window_size"] = (shape.sliding_window - 1, 0)
    defaults: dict[str, Any] = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Weights come from files or from name-seeded draws, never from Megatron's layout-dependent ones.
        "perform_initialization": False,
        "use_cpu_initialization": on_cpu,
        # It bypasses parameter hooks and breaks on frozen weights.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": not on_cpu,
        "bias_dropout_fusion": not on_cpu,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "attention_softmax_in_fp32": True,
    }
    defaults.update(_RECOMPUTE[training.recompute])
    if clash := sorted(decided.keys() & model.transformer_overrides.keys()):
        raise ConfigError(
            f"model.transformer_overrides.{clash[0]} is decided by model.hf_config, parallel or training; set it there"
        )
    try:
        return TransformerConfig(**decided, **{**defaults, **model.transformer_overrides})
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"megatron.core refuses this configuration (model, parallel, training): {error}") from error


def check_override_names(section: str, overrides: Mapping[str, Any], megatron_class: type) -> None:
    """Raises ConfigError for a name that Megatron's dataclass does not have, or a value of another type than its."""
    kinds = typing.get_type_hints(megatron_class)
    names = [field.name for field in dataclasses.fields(megatron_class)]
    for name, value in overrides.items():
        if name not in names:
            hint = did_you_mean(name, names)
            raise ConfigError(f"{section}.{name} is not a field of megatron.core's {megatron_class.__name__}{hint}")
        if not _fits(kinds[name], value):
            kind = inspect.formatannotation(kinds[name]).replace("typing.", "")
            raise ConfigError(f"{section}.{name}={shown(value)} is not of megatron.core's type for it, {kind[:80]}")


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value from YAML may stand for Megatron's annotation; a whole number may for a float."""
    if kind is Any:
        return True
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    plain = typing.get_origin(kind) or kind
    if isinstance(value, bool):
        return plain is bool
    if isinstance(value, int | float) and not math.isfinite(value):
        return False
    return isinstance(value, {float: (int, float), tuple: (tuple, list)}.get(plain, plain))
