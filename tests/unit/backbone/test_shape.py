from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from megatron_hgpt.backbone.shape import (
    FAMILIES,
    BackboneShape,
    check_tensor_parallel,
    legal_tensor_parallel_sizes,
    read_backbone,
)
from megatron_hgpt.backbone.transformer import transformer_config
from megatron_hgpt.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_hgpt.config_io import load_config, preset_names
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.validation import validate

PHI3 = load_config(preset="tiny").model.hf_config
LLAMA = load_config(preset="smollm2").model.hf_config
QWEN2 = load_config(preset="healthgpt_xl32").model.hf_config


def shape_of(preset: str) -> BackboneShape:
    return read_backbone(load_config(preset=preset).model.hf_config)


PUBLISHED = {
    "healthgpt_m3": {
        "family": "phi3", "num_layers": 32, "hidden_size": 3072, "ffn_size": 8192, "num_heads": 32, "num_kv_heads": 32,
        "head_dim": 96, "rope_theta": 1e4, "rms_eps": 1e-5, "qkv_bias": False, "max_positions": 4096,
        "sliding_window": 2047, "fused_qkv": True,
    },
    "healthgpt_l14": {
        "family": "phi3", "num_layers": 40, "hidden_size": 5120, "ffn_size": 17920, "num_heads": 40, "num_kv_heads": 10,
        "head_dim": 128, "rope_theta": 25e4, "rms_eps": 1e-5, "qkv_bias": False, "max_positions": 16384,
        "sliding_window": None, "fused_qkv": True,
    },
    "healthgpt_xl32": {
        "family": "qwen2", "num_layers": 64, "hidden_size": 5120, "ffn_size": 27648, "num_heads": 40, "num_kv_heads": 8,
        "head_dim": 128, "rope_theta": 1e6, "rms_eps": 1e-6, "qkv_bias": True, "max_positions": 32768,
        "sliding_window": None, "fused_qkv": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_three_variants_have_the_paper_s_backbones(preset: str) -> None:
    shape = shape_of(preset)
    assert {name: getattr(shape, name) for name in PUBLISHED[preset]} == PUBLISHED[preset]
    assert not shape.tied


@pytest.mark.parametrize("preset", preset_names())
def test_the_config_means_what_transformers_reads_in_it(preset: str) -> None:
    from transformers import CONFIG_MAPPING

    fields = load_config(preset=preset).model.hf_config
    shape = read_backbone(fields)
    config = CONFIG_MAPPING[shape.family](**{"pad_token_id": None, "eos_token_id": 0, **fields})
    assert config.rope_parameters["rope_theta"] == shape.rope_theta
    assert config.rope_parameters["rope_type"] == "default"
    assert config.rms_norm_eps == shape.rms_eps
    assert config.num_key_value_heads == shape.num_kv_heads
    assert getattr(config, "sliding_window", None) == shape.sliding_window
    # What transformers 5 writes into a config.json reads the same as the published (transformers 4) fields.
    assert read_backbone({**config.to_dict(), "architectures": fields["architectures"]}) == shape


def test_rope_theta_is_read_from_either_generation_of_config() -> None:
    old = {**PHI3, "rope_theta": 5e5}
    new = {**{k: v for k, v in PHI3.items() if k != "rope_theta"},
           "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}}  # fmt: skip
    assert read_backbone(old).rope_theta == 5e5
    assert read_backbone(new) == read_backbone(old)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_family_s_row_says_what_transformers_takes_where_a_config_is_silent(architecture: str) -> None:
    from transformers import CONFIG_MAPPING

    family = FAMILIES[architecture]
    config = CONFIG_MAPPING[family.model_type](pad_token_id=None, num_attention_heads=6, hidden_size=48)
    assert config.rms_norm_eps == family.default_rms_eps
    assert (config.num_key_value_heads != 6) == family.requires_num_kv_heads
    if family.sliding_window != "never":  # transformers keeps any unknown field, and Llama's model reads none
        windowed = CONFIG_MAPPING[family.model_type](pad_token_id=None, sliding_window=7)
        assert windowed.sliding_window == (7 if family.sliding_window == "always" else None)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "architectures='GemmaForCausalLM'": (PHI3, {"architectures": ["GemmaForCausalLM"]}),
    "architectures='(missing)'": (PHI3, {"architectures": None}),
    "model_type='phi4flash'": (PHI3, {"model_type": "phi4flash"}),
    "hidden_act='gelu'": (PHI3, {"hidden_act": "gelu"}),
    "attention_bias=True": (LLAMA, {"attention_bias": True}),
    "mlp_bias=True": (LLAMA, {"mlp_bias": True}),
    "attention_dropout=0.1": (QWEN2, {"attention_dropout": 0.1}),
    "resid_pdrop=0.1": (PHI3, {"resid_pdrop": 0.1}),
    # Phi-3-mini-128k, Phi-4-mini, Llama 3.1, Qwen2-VL
    "rope_scaling={'type': 'longrope'": (PHI3, {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}),
    "partial_rotary_factor=0.75": (PHI3, {"partial_rotary_factor": 0.75}),
    "rope_scaling={'factor': 8.0": (LLAMA, {"rope_scaling": {"factor": 8.0, "rope_type": "llama3"}}),
    "rope_scaling={'factor': 2.0": (LLAMA, {"rope_scaling": {"factor": 2.0}}),
    "rope_parameters={'rope_type': 'yarn'": (QWEN2, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    "rope_parameters={'full_attention'": (QWEN2, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
    "rope_scaling={'type': 'default', 'mrope": (QWEN2, {"rope_scaling": {"type": "default", "mrope_section": [16]}}),
    "use_sliding_window=True": (QWEN2, {"use_sliding_window": True}),
    "layer_types=": (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}),
    "sliding_window=0": (PHI3, {"sliding_window": 0}),
    "num_key_value_heads=3": (PHI3, {"num_key_value_heads": 3}),
    "lacks 'num_key_value_heads'": (QWEN2, {"num_key_value_heads": None}),
    "hidden_size=130": (PHI3, {"hidden_size": 130}),
    "lacks 'hidden_size'": (PHI3, {"hidden_size": None}),
    "lacks 'max_position_embeddings'": (PHI3, {"max_position_embeddings": None}),
    "num_hidden_layers='4'": (PHI3, {"num_hidden_layers": "4"}),
    "intermediate_size=-1": (PHI3, {"intermediate_size": -1}),
    # Values that are not even of the right type
    "architectures='Phi3ForCausalLM'": (PHI3, {"architectures": "Phi3ForCausalLM"}),
    "architectures=[['Phi3']]": (PHI3, {"architectures": [["Phi3"]]}),
    "layer_types=[['full_attention']]": (PHI3, {"layer_types": [["full_attention"]]}),
    "rms_norm_eps=None": (PHI3, {"rms_norm_eps": None}),
    "rms_norm_eps='small'": (PHI3, {"rms_norm_eps": "small"}),
    "rms_norm_eps=0": (PHI3, {"rms_norm_eps": 0}),
    "rope_theta='fast'": (PHI3, {"rope_theta": "fast"}),
    "rope_theta=nan": (PHI3, {"rope_theta": float("nan")}),
    "rope_scaling='linear'": (LLAMA, {"rope_scaling": "linear"}),
    "rope_scaling={'type': ['default']}": (LLAMA, {"rope_scaling": {"type": ["default"]}}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_reproduced_exactly_is_refused_by_name(message: str) -> None:
    config, change = REFUSED[message]
    read_backbone(config)  # the change alone is at fault
    with pytest.raises(ConfigError, match=re.escape(f"model.hf_config {message}" if "lacks" in message else message)):
        read_backbone({**config, **change})


def test_an_empty_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="architectures"):
        read_backbone({})


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("healthgpt_m3", [1, 2, 4, 8, 16, 32]),
        ("healthgpt_l14", [1, 2, 5, 10]),
        ("healthgpt_xl32", [1, 2, 4, 8]),
        ("smollm2", [1, 3]),
    ],
)
def test_tensor_parallel_sizes_that_fit(preset: str, sizes: list[int]) -> None:
    shape = shape_of(preset)
    assert legal_tensor_parallel_sizes(shape) == sizes
    for size in sizes:
        check_tensor_parallel(shape, size)
    for size in set(range(-1, 65)) - set(sizes):
        with pytest.raises(ConfigError):
            check_tensor_parallel(shape, size)


def test_an_impossible_tensor_parallel_size_is_answered_with_the_possible_ones() -> None:
    message = "size=4 cannot shard 40 attention heads with 10 KV heads and FFN 17920; use 1, 2, 5, 10"
    with pytest.raises(ConfigError, match=message):
        check_tensor_parallel(shape_of("healthgpt_l14"), 4)


def build(config: RunConfig, **model_fields: Any) -> Any:
    model = dataclasses.replace(config.model, **model_fields)
    return transformer_config(read_backbone(model.hf_config), model, config.parallel, config.training)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_megatron_gets_the_backbone_s_sizes(preset: str) -> None:
    config = load_config(preset=preset)
    config.parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    megatron, expected = build(config), PUBLISHED[preset]
    names = {
        "num_layers": "num_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "ffn_size",
        "num_attention_heads": "num_heads", "num_query_groups": "num_kv_heads", "kv_channels": "head_dim",
        "layernorm_epsilon": "rms_eps", "add_qkv_bias": "qkv_bias",
    }  # fmt: skip
    assert {ours: getattr(megatron, name) for name, ours in names.items()} == {
        ours: expected[ours] for ours in names.values()
    }
    assert (megatron.normalization, megatron.gated_linear_unit, megatron.add_bias_linear) == ("RMSNorm", True, False)
    assert megatron.activation_func is torch.nn.functional.silu
    assert (megatron.tensor_model_parallel_size, megatron.sequence_parallel) == (2, True)
    assert (megatron.params_dtype, megatron.bf16) == (torch.bfloat16, True)
    assert (megatron.hidden_dropout, megatron.attention_dropout) == (0.0, 0.0)
    assert megatron.calculate_per_token_loss
    assert not megatron.gradient_accumulation_fusion


def test_fp32() -> None:
    config = load_config(preset="tiny", overrides=["training.precision=fp32"])
    assert (build(config).params_dtype, build(config).bf16) == (torch.float32, False)


@pytest.mark.parametrize(("window", "expected"), [(2047, (2046, 0)), (2048, None), (4096, None), (None, None)])
def test_a_window_counts_the_positions_to_the_left_and_one_as_long_as_the_sequence_is_none(
    window: int | None, expected: tuple[int, int] | None
) -> None:
    # tests/parity/test_backbone_parity.py shows with a window of 5 that w tokens in all is what transformers means.
    config = load_config(preset="healthgpt_m3")
    assert build(config, hf_config={**config.model.hf_config, "sliding_window": window}).window_size == expected


@pytest.mark.parametrize(
    ("recompute", "granularity", "method"),
    [(None, None, None), ("selective", "selective", None), ("full", "full", "uniform")],
)
def test_recompute(recompute: str | None, granularity: str | None, method: str | None) -> None:
    config = load_config(preset="tiny")
    config.training.recompute = recompute
    megatron = build(config)
    assert (megatron.recompute_granularity, megatron.recompute_method) == (granularity, method)


def test_overrides_reach_megatron_and_unknown_or_decided_names_do_not() -> None:
    config = load_config(preset="tiny")
    assert build(config, transformer_overrides={"attention_dropout": 0.25}).attention_dropout == 0.25
    with pytest.raises(ConfigError, match="atention_dropout is not a field .* did you mean attention_dropout"):
        build(config, transformer_overrides={"atention_dropout": 0.25})
    with pytest.raises(ConfigError, match="layernorm_epsilon is decided by model.hf_config"):
        build(config, transformer_overrides={"layernorm_epsilon": 1e-3})
    with pytest.raises(ConfigError, match="window_size is decided"):
        build(config, transformer_overrides={"window_size": [8, 0]})
    with pytest.raises(ConfigError, match="recompute_granularity='some' is not of .*'selective'"):
        build(config, transformer_overrides={"recompute_granularity": "some"})


def test_transformer_config_refuses_an_impossible_layout() -> None:
    shape, model = shape_of("healthgpt_l14"), ModelConfig()
    with pytest.raises(ConfigError, match="use 1, 2, 5, 10"):
        transformer_config(shape, model, ParallelConfig(tensor_model_parallel_size=8), TrainingConfig())


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
    config = load_config(preset="tiny", overrides=["model.max_seq_length=4096", "training.num_steps=1"])
    with pytest.raises(ConfigError, match="max_seq_length=4096 exceeds .*=2048"):
        validate(config, 1, check_paths=False)
