"""Which layers a run gets, and what FP8 asks of it."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from megatron_hgpt import cpu_platform
from megatron_hgpt.backbone import implementation
from megatron_hgpt.backbone.implementation import describe_choice, resolve_transformer_impl, sequence_multiple
from megatron_hgpt.backbone.names import unfused_name
from megatron_hgpt.backbone.shape import read_backbone
from megatron_hgpt.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_hgpt.config_io import load_config
from megatron_hgpt.errors import ConfigError


def resolve(impl: str, precision: str = "bf16") -> str:
    return resolve_transformer_impl(ModelConfig(transformer_impl=impl), TrainingConfig(precision=precision))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine is importable and a GPU is there."""
    monkeypatch.setattr(implementation, "transformer_engine_problem", lambda: None)
    monkeypatch.setattr(implementation, "fp8_problem", lambda: None)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without Transformer Engine."""
    monkeypatch.setattr(cpu_platform, "is_cpu", lambda: False)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setattr(implementation.importlib.util, "find_spec", lambda _name: None)


@pytest.mark.usefixtures("installed")
def test_auto_takes_transformer_engine_where_it_runs() -> None:
    assert [resolve(impl) for impl in ("auto", "local", "transformer_engine")] == [
        "transformer_engine", "local", "transformer_engine",
    ]  # fmt: skip
    assert resolve("auto", "fp8") == "transformer_engine"


@pytest.mark.usefixtures("absent")
def test_auto_takes_local_layers_elsewhere_and_says_why() -> None:
    assert resolve("auto") == resolve("local") == "local"
    line = describe_choice(ModelConfig(), TrainingConfig())
    assert "local layers" in line and "model.transformer_impl=auto: transformer-engine is not installed" in line


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize(
    ("impl", "precision", "message"),
    [
        ("transformer_engine", "bf16", r"model.transformer_impl=transformer_engine cannot.*docs/gpu.md.*auto"),
        ("auto", "fp8", r"training.precision=fp8 needs Transformer Engine on a GPU.*training.precision=bf16"),
        ("local", "fp8", r"model.transformer_impl=local; set model.transformer_impl=auto"),
    ],
)
def test_what_cannot_be_used_is_refused(impl: str, precision: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(impl, precision)


def test_without_a_gpu_nothing_of_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_platform, "is_cpu", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    assert "no CUDA device" in str(implementation.transformer_engine_problem())
    assert resolve("auto") == "local"


def test_an_old_gpu_is_refused_in_transformer_engines_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "transformer_engine_problem", lambda: None)
    engine: Any = types.ModuleType("transformer_engine.pytorch")
    engine.is_fp8_available = lambda return_reason: (False, "Device compute capability 8.9 or higher required.")
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    with pytest.raises(ConfigError, match=r"fp8 does not run here: Device compute capability 8.9.*bf16"):
        resolve("auto", "fp8")


@pytest.mark.parametrize(
    ("size", "sequence_parallel", "context", "precision", "multiple"),
    [
        (1, False, 1, "bf16", 1),
        (4, False, 1, "bf16", 1),
        (4, True, 1, "bf16", 4),
        (1, False, 2, "bf16", 4),
        (4, True, 2, "bf16", 8),
        (3, True, 2, "bf16", 12),
        (1, False, 1, "fp8", 16),
        (3, True, 1, "fp8", 48),
        (2, True, 2, "fp8", 64),
    ],
)
def test_sequences_are_padded_to_what_the_gemms_take(
    size: int, sequence_parallel: bool, context: int, precision: str, multiple: int
) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=size, sequence_parallel=sequence_parallel, context_parallel_size=context
    )
    assert sequence_multiple(parallel, TrainingConfig(precision=precision)) == multiple


def test_fp8_needs_sides_that_are_multiples_of_16() -> None:
    config = load_config(preset="healthgpt_m3", overrides=[])
    shape = read_backbone(config.model.hf_config)
    assert list(implementation.fp8_problems(shape, config.model, ParallelConfig())) == []
    too_many = ParallelConfig(tensor_model_parallel_size=shape.ffn_size // 8)
    problems = list(implementation.fp8_problems(shape, config.model, too_many))
    assert any("needs multiples of 16, but the FFN features on one rank are 8" in problem for problem in problems)


def test_deepspeed_and_fp8_exclude_each_other() -> None:
    from megatron_hgpt.engines.deepspeed_settings import engine_problems

    config = load_config(preset="tiny", overrides=["engine.name=deepspeed", "training.precision=fp8"])
    assert any("runs on local layers" in problem for problem in engine_problems(config))


@pytest.mark.parametrize(
    ("fused", "own"),
    [
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.3.input_layernorm.weight"),
        (
            "module.decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
            "module.decoder.layers.0.pre_mlp_layernorm.weight",
        ),
        ("decoder.layers.3.self_attention.linear_qkv.weight", "decoder.layers.3.self_attention.linear_qkv.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
    ],
)
def test_fused_norms_have_the_local_names_in_files(fused: str, own: str) -> None:
    assert unfused_name(fused) == own
