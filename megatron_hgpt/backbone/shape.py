"""The architecture of the frozen language model: a Hugging Face config, read strictly.

Sizes are always read, never guessed from a model's name; a value that this code does not reproduce exactly is refused
by name, so that a checkpoint never runs as a slightly different model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_hgpt.errors import ConfigError, shown


@dataclass(frozen=True, kw_only=True)
class BackboneFamily:
    """What a Hugging Face architecture decides beside the sizes in its config.json, transformers' defaults included."""

    model_type: str
    fused_linears: bool
    """q, k, v are one linear, and so are gate and up."""
    qkv_bias: bool
    default_rms_eps: float
    """Where config.json does not give `rms_norm_eps`."""
    requires_num_kv_heads: bool
    """Without `num_key_value_heads` transformers takes a fixed number rather than the number of attention heads."""
    sliding_window: Literal["always", "on demand", "never"]
    """When transformers reads `sliding_window`: on demand means where `use_sliding_window` is true, in some layers."""


FAMILIES: Mapping[str, BackboneFamily] = {
    "Phi3ForCausalLM": BackboneFamily(
        model_type="phi3",
        fused_linears=True,
        qkv_bias=False,
        default_rms_eps=1e-5,
        requires_num_kv_heads=False,
        sliding_window="always",
    ),
    "LlamaForCausalLM": BackboneFamily(
        model_type="llama",
        fused_linears=False,
        qkv_bias=False,
        default_rms_eps=1e-6,
        requires_num_kv_heads=False,
        sliding_window="never",
    ),
    "Qwen2ForCausalLM": BackboneFamily(
        model_type="qwen2",
        fused_linears=False,
        qkv_bias=True,
        default_rms_eps=1e-6,
        requires_num_kv_heads=True,
        sliding_window="on demand",
    ),
}
"""Architecture, as config.json names it -> what it decides. A new family is one row."""


@dataclass(frozen=True, kw_only=True)
class BackboneShape:
    """What fixes the architecture of a decoder."""

    family: str
    """`BackboneFamily.model_type`: phi3, llama or qwen2."""
    fused_qkv: bool
    """q, k, v (and gate, up) are one linear in the HF model, so one H-LoRA pair A, R serves them (Phi)."""
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_eps: float
    qkv_bias: bool
    tied: bool
    """The checkpoint has one matrix for embedding and head; on import the head becomes a copy."""
    max_positions: int
    sliding_window: int | None
    """Tokens a position attends to, itself included; None attends to all before it."""


_LARGEST: Mapping[str, int] = {
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "head_dim": 2**14,
}
"""Above these no language model is: a damaged or hostile config.json would take the machine when it is built."""
_MOST_POSITIONS = 2**26
_MOST_PARAMETERS = 10**13


def _refuse(field: str, value: object, supported: str) -> ConfigError:
    return ConfigError(f"model.hf_config.{field}={shown(value)} is not supported; supported: {supported}")


def _size(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if value is None:
        raise ConfigError(
            f"model.hf_config lacks {field!r}: give the content of the backbone's config.json, or a preset"
        )
    most = _LARGEST.get(field, _MOST_POSITIONS)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _refuse(field, value, f"a positive integer, at most {most}")
    return value


def _number(config: Mapping[str, Any], field: str, default: float) -> float:
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise _refuse(field, value, "a positive number")
    return float(value)


def _rope_theta(config: Mapping[str, Any]) -> float:
    """theta from `rope_parameters` (transformers 5) or `rope_theta` (4); scaled or partial rotary is refused."""
    if config.get("rope_theta") is not None:
        _number(config, "rope_theta", 1.0)  # also where rope_parameters has another one, which then counts
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta"), "factor": config.get("partial_rotary_factor")}
    for section in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(section) or {}, Mapping):
            raise _refuse(section, config[section], "a section with rope_type 'default' and rope_theta, or null")
        values = dict(config.get(section) or {})
        rope["rope_theta"] = values.pop("rope_theta", rope["rope_theta"])
        rope["factor"] = values.pop("partial_rotary_factor", rope["factor"])
        kinds = [values.pop("rope_type", None), values.pop("type", None)]
        if values or any(kind not in (None, "default") for kind in kinds):
            raise _refuse(section, config[section], "rope_type 'default' and rope_theta alone")
    if rope["factor"] not in (None, 1):
        raise _refuse("partial_rotary_factor", rope["factor"], "1.0")
    theta = 10000.0 if rope["rope_theta"] is None else rope["rope_theta"]  # the default of all three families
    return _number({"rope_theta": theta}, "rope_theta", theta)


def _sliding_window(config: Mapping[str, Any], family: BackboneFamily) -> int | None:
    """Every layer's window, where transformers would read the field."""
    if family.sliding_window == "on demand" and config.get("use_sliding_window"):
        raise _refuse("use_sliding_window", True, "false (it would give some layers a window and others none)")
    if family.sliding_window != "always" or config.get("sliding_window") is None:
        return None
    return _size(config, "sliding_window")


def _family(config: Mapping[str, Any]) -> BackboneFamily:
    """The row of `FAMILIES` that `architectures` names and `model_type` does not contradict."""
    architectures = config.get("architectures") or ["(missing)"]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise _refuse("architectures", architectures, "a list with one of " + ", ".join(FAMILIES))
    if architectures[0] not in FAMILIES:
        raise _refuse("architectures", architectures[0], ", ".join(FAMILIES))
    family = FAMILIES[architectures[0]]
    if config.get("model_type", family.model_type) != family.model_type:
        raise _refuse("model_type", config["model_type"], f"{family.model_type}, which {architectures[0]} implies")
    return family


def read_backbone(config: Mapping[str, Any]) -> BackboneShape:
    """Read a Hugging Face config.json.

    Args:
        config: its content; `architectures` must name one of `FAMILIES`.

    Raises:
        ConfigError: a missing field, or a value that would change the computation in a way not implemented here.
    """
    family = _family(config)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _refuse("hidden_act", config["hidden_act"], "silu")
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            raise _refuse(field, config[field], "false (Qwen2's q, k, v bias is built in)")
    for field in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        if config.get(field):
            raise _refuse(field, config[field], "0.0")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise _refuse("layer_types", config["layer_types"], "full_attention in every layer")
    num_heads, hidden_size = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    num_kv_heads = num_heads
    if family.requires_num_kv_heads or config.get("num_key_value_heads") is not None:
        num_kv_heads = _size(config, "num_key_value_heads")
    if _size(config, "num_hidden_layers") * hidden_size * _size(config, "intermediate_size") > _MOST_PARAMETERS:
        raise _refuse("num_hidden_layers", config["num_hidden_layers"], f"at most {_MOST_PARAMETERS} weights")
    if num_heads % num_kv_heads:
        raise _refuse("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads={num_heads}")
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise _refuse(
            "hidden_size", hidden_size, f"a multiple of num_attention_heads={num_heads}, or head_dim beside it"
        )
    return BackboneShape(
        family=family.model_type,
        fused_qkv=family.fused_linears,
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_size=_size(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads if config.get("head_dim") is None else _size(config, "head_dim"),
        rope_theta=_rope_theta(config),
        rms_eps=_number(config, "rms_norm_eps", family.default_rms_eps),
        qkv_bias=family.qkv_bias,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_size(config, "max_position_embeddings"),
        sliding_window=_sliding_window(config, family),
    )


def legal_tensor_parallel_sizes(shape: BackboneShape) -> list[int]:
    """Sizes that divide the heads, the KV heads (their replication is not implemented) and the FFN."""
    sizes = range(1, shape.num_kv_heads + 1)
    return [t for t in sizes if shape.num_heads % t == shape.num_kv_heads % t == shape.ffn_size % t == 0]


def check_tensor_parallel(shape: BackboneShape, size: int) -> None:
    """Raises ConfigError when `size` cannot shard the backbone, naming the sizes that can."""
    legal = legal_tensor_parallel_sizes(shape)
    if size not in legal:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size={size} cannot shard {shape.num_heads} attention heads with "
            f"{shape.num_kv_heads} KV heads and FFN {shape.ffn_size}; use {', '.join(map(str, legal))}"
        )
