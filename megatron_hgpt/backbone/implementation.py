"""Which layers the language model is built from, local or Transformer Engine's, and what FP8 asks of a run.

`model.transformer_impl` decides: ``local``, ``transformer_engine``, or ``auto``, which takes Transformer Engine where
it is installed and a CUDA device is used. FP8 (`training.precision`) runs on Transformer Engine only.

FP8 means: the GEMMs of the frozen weights take FP8 inputs (hybrid format: E4M3 forward, E5M2 backward) with one scale
per tensor, taken from the tensor itself (current scaling), so that there is no scaling history to save. Parameters
stay bf16; H-LoRA, embedding, head, norms and attention compute in bf16.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from megatron_hgpt import cpu_platform
from megatron_hgpt.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_hgpt.errors import ConfigError

if TYPE_CHECKING:
    from megatron_hgpt.backbone.shape import BackboneShape

LOCAL: Final = "local"
TRANSFORMER_ENGINE: Final = "transformer_engine"
AUTO: Final = "auto"

_FP8_MULTIPLE = 16
"""cuBLAS takes FP8 matrices whose sides are multiples of 16."""

_FP8_ON_LOCAL = (
    "training.precision=fp8 needs Transformer Engine, but model.transformer_impl=local; "
    "set model.transformer_impl=auto, or training.precision=bf16"
)


def keeps_bf16_parameters(training: TrainingConfig) -> bool:
    """Whether parameters and activations outside FP8 GEMMs are bf16."""
    return training.precision in ("bf16", "fp8")


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be used in this process; None when it can.

    Raises:
        ConfigError: it is installed only in part.
    """
    if cpu_platform.is_cpu():
        return "there is no CUDA device, and Transformer Engine has no CPU mode"
    cpu_platform.check_transformer_engine()
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer-engine is not installed"
    return None


def fp8_problem() -> str | None:
    """Why the device cannot compute in FP8, in Transformer Engine's words; None when it can. Needs an importable TE."""
    pytorch: Any = importlib.import_module("transformer_engine.pytorch")
    available, reason = pytorch.is_fp8_available(return_reason=True)
    return None if available else reason


def resolve_transformer_impl(model: ModelConfig, training: TrainingConfig) -> str:
    """``local`` or ``transformer_engine``.

    Raises:
        ConfigError: Transformer Engine is asked for (by name or by FP8) and cannot be used, or FP8
            together with the local layers.
    """
    wanted = model.transformer_impl
    is_fp8 = training.precision == "fp8"
    if wanted == LOCAL:
        if is_fp8:
            raise ConfigError(_FP8_ON_LOCAL)
        return LOCAL
    problem = transformer_engine_problem()
    if problem is None:
        if is_fp8 and (reason := fp8_problem()):
            raise ConfigError(f"training.precision=fp8 does not run here: {reason} Set training.precision=bf16")
        return TRANSFORMER_ENGINE
    if is_fp8:
        raise ConfigError(
            f"training.precision=fp8 needs Transformer Engine on a GPU: {problem}. Install it as docs/gpu.md says, or "
            "set training.precision=bf16"
        )
    if wanted == TRANSFORMER_ENGINE:
        raise ConfigError(
            f"model.transformer_impl=transformer_engine cannot be used: {problem}. Install it as docs/gpu.md says, or "
            "set model.transformer_impl=auto"
        )
    return LOCAL


def describe_choice(model: ModelConfig, training: TrainingConfig) -> str:
    """One line for the log: the layers in use, and for ``auto`` why.

    Raises:
        ConfigError: as `resolve_transformer_impl`.
    """
    chosen = resolve_transformer_impl(model, training)
    names = {
        LOCAL: "megatron.core's local layers with torch's attention",
        TRANSFORMER_ENGINE: "Transformer Engine layers",
    }
    why = ""
    if model.transformer_impl == AUTO:
        problem = transformer_engine_problem()
        why = f" (model.transformer_impl=auto: {problem or 'it is installed and a GPU is used'})"
    precision = ", frozen GEMMs in FP8" if training.precision == "fp8" else ""
    return f"language model on {names[chosen]}{precision}{why}"


def sequence_multiple(parallel: ParallelConfig, training: TrainingConfig) -> int:
    """Padded sequence lengths (tokens) are multiples of it.

    Sequence parallelism (T) and context parallelism (C) give every rank an equal share; the latter in two chunks.
    In FP8 the tokens of a micro-batch on each rank, sequence / (C * T) * samples, must be a multiple of 16.
    """
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    multiple = context * tensor if parallel.sequence_parallel else context
    if context > 1:
        multiple = math.lcm(multiple, 2 * context)
    return math.lcm(multiple, _FP8_MULTIPLE * context * tensor) if training.precision == "fp8" else multiple


def transformer_settings(model: ModelConfig, training: TrainingConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that this module decides.

    Raises:
        ConfigError: as `resolve_transformer_impl`.
    """
    is_fp8 = training.precision == "fp8"
    return {
        "transformer_impl": resolve_transformer_impl(model, training),
        "fp8": "hybrid" if is_fp8 else None,
        "fp8_recipe": "tensorwise",
        "fp8_param": False,
    }


def fp8_problems(shape: BackboneShape, model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Why FP8 cannot be used: local layers, or sides of the frozen weights on one rank that FP8 GEMMs cannot take.

    T must divide the backbone already. What the machine lacks is `resolve_transformer_impl`'s business.
    """
    if model.transformer_impl == LOCAL:
        yield _FP8_ON_LOCAL
    size = parallel.tensor_model_parallel_size
    heads = shape.num_heads * shape.head_dim // size
    sides = {
        "hidden size": shape.hidden_size,
        "query features": heads,
        "query, key and value features": heads + 2 * shape.num_kv_heads * shape.head_dim // size,
        "FFN features": shape.ffn_size // size,
    }
    for name, side in sides.items():
        if side % _FP8_MULTIPLE:
            yield (
                f"training.precision=fp8 needs multiples of {_FP8_MULTIPLE}, but the {name} on one rank are {side} at "
                f"parallel.tensor_model_parallel_size={size}; lower it, or set training.precision=bf16"
            )
