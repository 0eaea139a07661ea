"""The H-LoRA formula (HealthGPT paper, section 3.2), written plainly: the reference every fast path is tested against.

For one linear and one plugin with k experts of total rank r, and x of shape [..., in]::

    scale = alpha / r * k
    g     = softmax(x R^T)                          R: [k, in]   all experts active, per token
    u     = dropout(scale * x A^T) * expand(g)      A: [r, in]   expert e owns rows [e*r/k, (e+1)*r/k)
    y     = x W^T + b + u B^T                       B: [out, r]  W and b frozen

The gate depends on the token, so for k > 1 the branch can never be merged into W.
"""

from __future__ import annotations

import torch

from megatron_hgpt.config import HLoRAPluginConfig
from megatron_hgpt.errors import ConfigError


def hlora_scale(plugin: HLoRAPluginConfig) -> float:
    """alpha / r * k."""
    return plugin.alpha / plugin.lora_rank * plugin.num_experts


def hlora_delta(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    router: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scale: float,
    dropout_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What H-LoRA adds to the base linear's output.

    Args:
        x: [..., in] input of the base linear.
        lora_a: [r, in].
        router: [k, in].
        lora_b: [out, r].
        scale: alpha / r * k.
        dropout_mask: [..., r], zero or 1 / (1 - p); None keeps everything.

    Returns:
        [..., out].
    """
    num_experts = router.shape[0]
    gate = torch.softmax(x @ router.T, dim=-1)  # [..., k]
    low_rank = scale * (x @ lora_a.T)  # [..., r]
    if dropout_mask is not None:
        low_rank = low_rank * dropout_mask
    return (low_rank * gate.repeat_interleave(lora_a.shape[0] // num_experts, dim=-1)) @ lora_b.T


def merge(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, plugin: HLoRAPluginConfig) -> torch.Tensor:
    """The weight [out, in] with the plugin merged in: possible for one expert only, whose gate is constantly 1.

    Raises:
        ConfigError: more than one expert: the gate depends on the token.
    """
    if plugin.num_experts != 1:
        raise ConfigError(
            f"an H-LoRA plugin of num_experts={plugin.num_experts} cannot be merged: its gate depends on the token. "
            "Export it beside the base weights; only num_experts=1 (plain LoRA) can merge."
        )
    return weight + hlora_scale(plugin) * (lora_b @ lora_a)
