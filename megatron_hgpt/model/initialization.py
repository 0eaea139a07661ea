"""Initial weights drawn from a seed that depends on the parameter's name: the same model at every layout.

Megatron draws each shard from the rank's own generator, so TP1 and TP2 start from different models. Here the full
tensor is drawn and then sliced.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch

from megatron_hgpt.parameters import canonical_name

if TYPE_CHECKING:
    from megatron_hgpt.model.healthgpt import HealthGPT

_INIT_STD = 0.02


def generator_for(name: str, seed: int) -> torch.Generator:
    """A CPU generator seeded by `seed` and `name` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialize_by_name(model: HealthGPT, *, seed: int, include_backbone: bool) -> None:
    """Initialise adapters and H-LoRA, and the language model when it has no checkpoint.

    A and R are Kaiming uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)); B is zero; adapters are as
    torch.nn.Linear's default; backbone matrices N(0, 0.02), norms one, biases zero. The tower is left as it is.
    """
    group = model.pg_tp
    for name, parameter in model.named_parameters():
        is_plugin, is_adapter = ".hlora." in name, name.startswith("adapters.")
        if name.startswith("tower.") or not (is_plugin or is_adapter or include_backbone):
            continue
        full_shape = list(parameter.shape)
        axis = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        if axis is not None:
            full_shape[axis] *= group.size()
        full = _draw(
            name,
            full_shape,
            generator_for(canonical_name(name, model.layer_offset), seed),
            is_plugin or is_adapter,
            model,
        )
        if axis is not None:
            full = full.chunk(group.size(), dim=axis)[group.rank()]
        parameter.copy_(full)


def _draw(name: str, shape: list[int], generator: torch.Generator, is_added: bool, model: HealthGPT) -> torch.Tensor:
    if ".lora_b." in name:
        return torch.zeros(shape)
    if is_added:
        fan_in = shape[-1] if len(shape) > 1 else _bias_fan_in(name, model)
        bound = 1.0 / math.sqrt(fan_in)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.empty(shape).normal_(0.0, _INIT_STD, generator=generator)


def _bias_fan_in(name: str, model: HealthGPT) -> int:
    return model.get_parameter(name.removesuffix("bias") + "weight").shape[-1]
