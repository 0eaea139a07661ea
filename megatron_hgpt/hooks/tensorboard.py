"""TensorBoard scalars, configuration text and sample images, in <output_dir>/tensorboard."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from PIL import Image

from megatron_hgpt.errors import ConfigError
from megatron_hgpt.hooks.base import Anomaly, Hook, StepRecord, TrainState, ValidationRecord
from megatron_hgpt.hooks.figures import step_scalars, validation_scalars
from megatron_hgpt.hooks.tolerance import Tolerance

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardHook(Hook):
    """Scalars every `interval_steps` optimizer steps; after a resume or a rollback TensorBoard hides the
    steps that run again. Once its file cannot be written, the rest of the run is without it."""

    def __init__(self, *, interval_steps: int = 1) -> None:
        self.interval_steps = interval_steps
        self._writer: SummaryWriter | None = None
        self._open: Callable[[int], SummaryWriter] | None = None
        self._folder = Path()
        self._tolerance = Tolerance()

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
        self._folder = state.output_dir / "tensorboard"
        self._open = lambda step: SummaryWriter(str(self._folder), purge_step=step + 1)
        _silence_writing_thread()
        text = yaml.safe_dump(asdict(state.config), sort_keys=False)
        with self._writing():
            self._writer = self._open(state.step)
            self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), state.step)

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """Losses, learning rates, gradient norm, throughput."""
        if self._writer is None or not state.is_due(self.interval_steps):
            return
        with self._writing():
            for tag, value in step_scalars(record).items():
                self._writer.add_scalar(tag, value, record.step)

    def on_anomaly(self, state: TrainState, anomaly: Anomaly) -> None:
        """After a rollback hide the steps that run again, as after a resume."""
        if anomaly.action == "rollback" and self._writer is not None and self._open is not None:
            with self._writing():
                self._writer.close()
                self._writer = self._open(state.step)

    def on_validation(self, state: TrainState, record: ValidationRecord) -> None:
        """Held-out losses."""
        if self._writer is None:
            return
        with self._writing():
            for tag, value in validation_scalars(record).items():
                self._writer.add_scalar(tag, value, record.step)

    def add_images(self, step: int, images: list[tuple[str, Image.Image]]) -> None:
        """Draw `images` at `step`; does nothing on ranks that do not write."""
        if self._writer is None:
            return
        with self._writing():
            for tag, image in images:
                self._writer.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def on_fit_end(self, state: TrainState) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            with self._writing():
                self._writer.close()
            self._writer = None

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Keep what was recorded before the error."""
        self.on_fit_end(state)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A block that writes; the writer is given up when it fails, for its thread has ended then."""
        with self._tolerance.writing(self._folder):
            try:
                yield
            except OSError:
                self._writer = None
                raise


def _silence_writing_thread() -> None:
    """What ends TensorBoard's thread is raised again where the next figure is written, and warned of there."""
    report = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        is_known = type(arguments.thread).__name__ == "_AsyncWriterThread" and issubclass(arguments.exc_type, OSError)
        if not is_known:
            report(arguments)

    threading.excepthook = hook
