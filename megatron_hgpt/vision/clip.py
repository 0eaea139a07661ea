"""The frozen CLIP tower of hierarchical visual perception (HealthGPT paper, section 3.1): one tower, two depths.

Depths are Hugging Face `hidden_states` indices: 0 is the embedding after the pre-LayerNorm, i is after block i, and
negative ones count from the end. Comprehension reads -2, generation 1; neither passes the post-LayerNorm. A task runs
only the blocks it needs: one of 24 for generation. transformers' CLIPVisionModel supplies the blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_hgpt.config import VisionConfig
from megatron_hgpt.errors import CheckpointError, ConfigError, did_you_mean
from megatron_hgpt.samples import Task

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

logger = logging.getLogger(__name__)

_RANDOM_SEED = 20250213
"""Of the random tower, which every rank draws alike when there is no checkpoint."""


class HVPTower(nn.Module):
    """CLIP's vision blocks up to the deepest one needed; always frozen and in evaluation mode.

    Attributes:
        num_image_tokens: patch tokens per image; the CLS token is dropped.
        hidden_size: features per token.
        image_size: side of the square input, pixels.
    """

    def __init__(self, clip: CLIPVisionModel, num_blocks: Mapping[Task, int]) -> None:
        super().__init__()
        vision = getattr(clip, "vision_model", clip)  # transformers 5.0 nests the tower one level deeper
        self.embeddings = vision.embeddings
        self.pre_layrnorm = vision.pre_layrnorm
        self.blocks = nn.ModuleList(vision.encoder.layers[: max(num_blocks.values())])
        self.num_blocks = dict(num_blocks)
        self.hidden_size = int(clip.config.hidden_size)
        self.image_size = int(clip.config.image_size)
        self.num_image_tokens = (self.image_size // int(clip.config.patch_size)) ** 2
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_config(cls, vision: VisionConfig, tasks: Sequence[Task]) -> HVPTower:
        """Build or load the tower for `tasks`.

        Raises:
            ConfigError: no sizes, or a depth outside the tower.
            CheckpointError: the folder lacks tensors or does not fit the configured sizes.
        """
        _check_keys(vision)
        clip = _load(Path(vision.tower), vision) if vision.tower else _random(vision)
        if not tasks:
            raise ConfigError("the vision tower needs at least one task")
        num_layers = int(clip.config.num_hidden_layers)
        return cls(clip, {task: _blocks_for(task, _depth(vision, task), num_layers) for task in tasks})

    def train(self, mode: bool = True) -> HVPTower:
        """Stay in evaluation mode: the tower is frozen in every stage."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, task: Task) -> torch.Tensor:
        """Patch features.

        Args:
            pixel_values: [n, 3, image_size, image_size], CLIP-normalised.
            task: chooses the depth.

        Returns:
            [n, num_image_tokens, hidden_size].
        """
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        for block in self.blocks[: self.num_blocks[task]]:
            hidden = block(hidden, None)
        return hidden[:, 1:]


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws a bar for each file of weights that it reads or writes, in every process."""
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _check_keys(vision: VisionConfig) -> None:
    """transformers keeps an unknown key as an attribute, so a misspelt size would silently be the default one.

    Raises:
        ConfigError: a key of `hf_config` that CLIP's vision configuration lacks, with the nearest one.
    """
    from transformers import CLIPVisionConfig

    names = list(CLIPVisionConfig().to_dict())
    for key in vision.hf_config:
        if key not in names:
            hint = did_you_mean(key, names)
            raise ConfigError(f"model.vision.hf_config.{key} is not a field of CLIP's vision configuration{hint}")


def num_blocks_of(vision: VisionConfig, task: Task) -> int:
    """Blocks that run for `task`, from the configuration alone.

    Raises:
        ConfigError: a depth outside the tower.
    """
    return _blocks_for(task, _depth(vision, task), int(vision.hf_config["num_hidden_layers"]))


def tower_hash(vision: VisionConfig) -> str:
    """Identity of the tower's weights, without building it: sha256 over its folder's config.json and safetensors.

    A tower that is drawn at random is identified by its configuration, its seed and torch's version.

    Raises:
        CheckpointError: the folder lacks config.json or safetensors.
    """
    if vision.tower is None:
        drawn = [vision.hf_config, _RANDOM_SEED, torch.__version__]
        return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()
    files = [Path(vision.tower) / "config.json", *sorted(Path(vision.tower).glob("*.safetensors"))]
    if len(files) < 2 or not files[0].is_file():
        raise CheckpointError(f"model.vision.tower={vision.tower} lacks config.json or safetensors")
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def _depth(vision: VisionConfig, task: Task) -> int:
    return vision.comprehension_hidden_state if task is Task.COMPREHENSION else vision.generation_hidden_state


def _blocks_for(task: Task, index: int, num_layers: int) -> int:
    """Blocks to run for `hidden_states[index]` of num_layers + 1 entries."""
    if type(index) is not int or not -(num_layers + 1) <= index <= num_layers:
        raise ConfigError(
            f"model.vision.{task.value}_hidden_state={index!r} is outside a tower of {num_layers} blocks; "
            f"use {-(num_layers + 1)} to {num_layers}"
        )
    return index if index >= 0 else num_layers + 1 + index


def _random(vision: VisionConfig) -> CLIPVisionModel:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if not vision.hf_config:
        raise ConfigError("model.vision needs either `tower` (a folder) or `hf_config` (its config.json)")
    logger.warning("model.vision.tower is not set: the vision tower has random weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        try:
            return CLIPVisionModel(CLIPVisionConfig(**vision.hf_config, attn_implementation="sdpa"))
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ConfigError(f"model.vision.hf_config does not describe a CLIP tower: {error}") from error


def _load(folder: Path, vision: VisionConfig) -> CLIPVisionModel:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"model.vision.tower={folder} is not a Hugging Face folder (config.json is missing)")
    try:
        config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder}/config.json does not describe a CLIP tower: {error}") from error
    for key, value in vision.hf_config.items():
        if key in _SIZES and getattr(config, key) != value:
            raise CheckpointError(
                f"{folder}/config.json has {key}={getattr(config, key)}, model.vision.hf_config says {value}"
            )
    try:
        with without_progress_bars():
            model, info = CLIPVisionModel.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
                attn_implementation="sdpa",
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load the CLIP tower from {folder}: {error}; the weights have to be safetensors "
            "(`save_pretrained` writes them)"
        ) from error
    missing = [key for key in info["missing_keys"] if "position_ids" not in key]
    unexpected = [
        key for key in info["unexpected_keys"] if not key.startswith(_OTHER_HALF) and "position_ids" not in key
    ]
    if missing or unexpected or info["mismatched_keys"]:
        raise CheckpointError(
            f"{folder} does not hold the CLIP tower it describes: missing {missing[:3]} ({len(missing)}), "
            f"unexpected {unexpected[:3]} ({len(unexpected)}), wrong shape {list(info['mismatched_keys'])[:3]}"
        )
    return model


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
_OTHER_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
"""Tensors of a whole CLIP model, the published form, that a vision tower leaves out."""
