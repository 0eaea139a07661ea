"""Names of the language model's parameters: two layer specs, one set of names for files.

Transformer Engine's column-parallel linear holds the norm in front of it. Everything that outlives a process goes by
the local spec's names: Hugging Face import and export, keys in checkpoints.

    Transformer Engine                               local, and in files
    self_attention.linear_qkv.layer_norm_weight      input_layernorm.weight
    mlp.linear_fc1.layer_norm_weight                 pre_mlp_layernorm.weight
"""

from __future__ import annotations

FUSED_NORM_PREFIXES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Within one layer: prefix of a fused norm's tensors -> prefix in the local spec."""


def unfused_name(name: str) -> str:
    """The local spec's name of a parameter of either spec; any prefix in front of the layer stays."""
    for fused, own in FUSED_NORM_PREFIXES.items():
        name = name.replace(fused, own)
    return name
