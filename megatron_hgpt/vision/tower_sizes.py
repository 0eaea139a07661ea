"""Checks of a CLIP tower's sizes, before anything of these sizes is made."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hgpt.config import RunConfig
from megatron_hgpt.errors import shown
from megatron_hgpt.stages import Stage


def tower_problems(config: RunConfig, stage: Stage) -> Iterator[str]:
    """What is wrong with `model.vision.hf_config` and the depths that are read of it, as messages."""
    vision, sizes = config.model.vision, config.model.vision.hf_config
    wrong = [
        key for key, most in _VISION_SIZES.items() if type(sizes.get(key)) is not int or not 1 <= sizes[key] <= most
    ]
    for key in wrong:
        yield (
            f"model.vision.hf_config.{key}={shown(sizes.get(key))} must be a positive integer, at most "
            f"{_VISION_SIZES[key]}"
        )
    if wrong:
        return
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        yield (
            f"model.vision.hf_config.num_attention_heads={sizes['num_attention_heads']} must divide hidden_size="
            f"{sizes['hidden_size']}"
        )
    if sizes["patch_size"] > sizes["image_size"]:
        yield (
            f"model.vision.hf_config.patch_size={sizes['patch_size']} exceeds image_size={sizes['image_size']}: "
            "a picture would give no token"
        )
    for task in stage.tasks:
        depth, blocks = getattr(vision, f"{task.value}_hidden_state"), sizes["num_hidden_layers"]
        if not -(blocks + 1) <= depth <= blocks:
            yield (
                f"model.vision.{task.value}_hidden_state={depth} is outside a tower of {blocks} blocks; "
                f"use {-(blocks + 1)} to {blocks}"
            )


_VISION_SIZES = {
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "image_size": 2**13,
    "patch_size": 2**13,
}
"""Of a tower, and what is no tower's any more."""
