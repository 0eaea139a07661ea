"""TensorBoard scalars, configuration text and sample images, in <output_dir>/tensorboard."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import yaml
from PIL import Image

from megatron_hgpt.errors import ConfigError
from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardHook(Hook):
    """Scalars every `interval_steps` optimizer steps; after a resume TensorBoard hides the steps that run again."""

    def __init__(self, *, interval_steps: int = 1) -> None:
        self.interval_steps = interval_steps
        self._writer: SummaryWriter | None = None

    def on_fit_start(self, state: TrainState) -> None:
        """Open the event file and store the resolved configuration.

        Raises:
            ConfigError: the tensorboard package is not installed.
        """
        if not state.is_writer:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "logging.tensorboard is true but the tensorboard package is missing: "
                "pip install tensorboard, or set logging.tensorboard=false"
            ) from error
        self._writer = SummaryWriter(str(state.output_dir / "tensorboard"), purge_step=state.step + 1)
        text = yaml.safe_dump(asdict(state.config), sort_keys=False)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), state.step)

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """Losses, learning rates, gradient norm, throughput."""
        if self._writer is None or not state.is_due(self.interval_steps):
            return
        scalars = {
            "loss/all": record.loss,
            **{f"loss/{task}": loss for task, loss in record.loss_per_task.items()},
            **{f"learning_rate/{group}": rate for group, rate in record.learning_rates.items()},
            "grad_norm": record.grad_norm,
            "throughput/tokens_per_s": record.tokens_per_s,
            "throughput/step_time_s": record.step_time_s,
            "throughput/padding_share": record.padding_share,
        }
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, record.step)

    def add_images(self, step: int, images: list[tuple[str, Image.Image]]) -> None:
        """Draw `images` at `step`; does nothing on ranks that do not write."""
        if self._writer is None:
            return
        for tag, image in images:
            self._writer.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def on_fit_end(self, state: TrainState) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Keep what was recorded before the error."""
        self.on_fit_end(state)
