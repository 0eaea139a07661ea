"""Pictures the model draws while it trains: PNG files in <output_dir>/samples, and TensorBoard."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from PIL import Image

from megatron_hgpt.files import write_atomic
from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState
from megatron_hgpt.hooks.tensorboard import TensorBoardHook
from megatron_hgpt.hooks.tolerance import Tolerance

SampleImages = Callable[[TrainState], list[tuple[str, Image.Image]]]
"""Draws a few samples; called on every rank at the same step, because a sharded model needs all of them."""


class ImageSamplesHook(Hook):
    """Calls `sample_images` every `interval_steps` optimizer steps and after the last; the writing rank keeps them."""

    def __init__(
        self, *, interval_steps: int, sample_images: SampleImages, tensorboard: TensorBoardHook | None = None
    ) -> None:
        self.interval_steps = interval_steps
        self.sample_images = sample_images
        self.tensorboard = tensorboard
        self._tolerance = Tolerance()

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """Draw when due."""
        if record.step % self.interval_steps and record.step != state.total_steps:
            return
        images = self.sample_images(state)
        if not state.is_writer:
            return
        folder = state.output_dir / "samples" / f"step_{record.step:08d}"
        for index, (tag, image) in enumerate(images):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            with self._tolerance.writing(folder.parent):
                write_atomic(folder / f"{index:03d}_{re.sub(r'[^A-Za-z0-9]+', '_', tag)[:80]}.png", buffer.getvalue())
        if self.tensorboard is not None:
            self.tensorboard.add_images(record.step, images)
