"""Typed samples and batches: what travels between the data builders, the mmap files, the loader and the model.

Shape legend: b = micro-batch size (samples), s = padded sequence length (tokens), n = images in the micro-batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

if TYPE_CHECKING:
    from PIL import Image

IGNORE_INDEX = -100
"""Label of a position that is not supervised (spec section 3)."""

IMAGE_TOKEN_ID = -200
"""Stored in the token stream where one image's features go; never a vocabulary id."""

IMAGE_PLACEHOLDER = "<image>"
"""The same place in the text of a conversation."""


class Task(StrEnum):
    """What the model does with a sample; selects vision depth, adapter and H-LoRA plugin (hard routing)."""

    COMPREHENSION = "comprehension"
    GENERATION = "generation"

    @property
    def code(self) -> int:
        """0 for comprehension, 1 for generation: how the task is stored in binary files."""
        return list(Task).index(self)


TASKS: tuple[Task, ...] = tuple(Task)


@dataclass(kw_only=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: str
    """``"user"`` or ``"assistant"``."""
    text: str
    """Text with ``<image>`` placeholders; of a generation answer, the text before the image (usually empty)."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One VL-Health record after parsing, before tokenisation."""

    sample_id: str
    task: Task
    turns: list[Turn]
    images: list[Path | bytes] = field(default_factory=list)
    """Input images in the order of their placeholders: a path, or the encoded bytes (PNG, JPEG)."""
    target_image: Path | bytes | None = None
    """Generation only: the image to draw."""
    target_indices: list[int] | None = None
    """Generation only: the VQ indices of the image to draw, raster order, when they are given instead of the image."""
    source: str = ""
    """Name of the data source, for per-source statistics."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class EncodedSample:
    """One sample as the mmap dataset returns it."""

    sample_id: str
    task: Task
    tokens: torch.Tensor
    """int64 [t]: token ids with `IMAGE_TOKEN_ID` once per image."""
    loss_mask: torch.Tensor
    """bool [t]: True where the token itself is supervised (is predicted and counts in the loss)."""
    images: list[bytes | Image.Image]
    """Input images in order, as `load_image` takes them: encoded as they are stored, so that a decoded one is in memory
    only while it is used. Empty where `features` stand for them."""
    features: list[torch.Tensor] = field(default_factory=list)
    """[p, c] of each input image, read from the feature cache at the task's depth."""


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """One micro-batch, ready for the model: right-padded samples of one task in rows, or one row of packed samples."""

    task: Task | None
    """Of all samples; None in a pack that holds both."""
    tokens: torch.Tensor
    """int64 [b, s]: ids; 0 at image-feature and padding positions."""
    labels: torch.Tensor
    """int64 [b, s]: the id to predict AT this position (already shifted left by one); IGNORE_INDEX elsewhere."""
    position_ids: torch.Tensor
    """int64 [b, s]: 0, 1, … through the image features; packed samples each start at 0 again."""
    image_mask: torch.Tensor
    """bool [b, s]: True where an image feature goes; row-major order equals (image, feature) order."""
    pixel_values: torch.Tensor
    """float32 [n, 3, height, width], CLIP-normalised; n may be 0."""
    image_tasks: tuple[Task, ...] = ()
    """Task of each of the n images, in a pack of both tasks."""
    token_tasks: torch.Tensor | None = None
    """uint8 [b, s]: `Task.code` of each position, in a pack of both tasks."""
    boundaries: tuple[int, ...] = ()
    """Start of each packed sample, and s: padding belongs to the last one. Empty without packing."""
    sample_ids: list[str]
    num_supervised_tokens: int
    """Positions with a label, in this micro-batch."""
    num_content_tokens: int
    """Positions that hold text, image features or VQ tokens: b * s less the padding."""
    image_features: torch.Tensor | None = None
    """[n, p, c] from the feature cache, of `task`'s depth; then pixel_values is empty and the tower is not run."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of the samples."""
        return TASKS if self.task is None else (self.task,)

    @property
    def num_images(self) -> int:
        """Images in the micro-batch, as pixels or as features."""
        return len(self.pixel_values if self.image_features is None else self.image_features)

    def to(self, device: torch.device | str) -> MicroBatch:
        """A copy with every tensor on `device`."""
        return dataclasses.replace(
            self,
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            image_mask=self.image_mask.to(device),
            pixel_values=self.pixel_values.to(device),
            token_tasks=None if self.token_tasks is None else self.token_tasks.to(device),
            image_features=None if self.image_features is None else self.image_features.to(device),
        )
