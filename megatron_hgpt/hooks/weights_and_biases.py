"""Scalars and configuration to Weights & Biases, through its own library; WANDB_MODE=offline keeps them on disk."""

from __future__ import annotations

import logging
from typing import Any

from megatron_hgpt.config_io import to_dict
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState, ValidationRecord
from megatron_hgpt.hooks.external import import_tracker, store_run_id, stored_run_id
from megatron_hgpt.hooks.figures import step_scalars, validation_scalars

logger = logging.getLogger(__name__)


class WeightsAndBiasesHook(Hook):
    """A run named after the configuration, with TensorBoard's scalars; a resumed run goes on as the same one.

    Args:
        project: `logging.wandb_project`.
        interval_steps: optimizer steps between records.
    """

    def __init__(self, *, project: str, interval_steps: int = 1) -> None:
        self.project = project
        self.interval_steps = interval_steps
        self._run: Any = None

    def on_fit_start(self, state: TrainState) -> None:
        """Start the run, or the next part of it.

        Raises:
            ConfigError: wandb is not installed, or the service refuses the run.
        """
        if not state.is_writer:
            return
        wandb = import_tracker(
            "wandb", field="logging.wandb_project", package="wandb", defaults={"WANDB_ERROR_REPORTING": "false"}
        )
        try:
            self._run = wandb.init(
                project=self.project,
                name=f"{state.config.name} {state.stage}",
                id=stored_run_id(state, "wandb"),
                resume="allow",
                dir=str(state.output_dir),
                config=to_dict(state.config),
                allow_val_change=True,  # a resumed run may have other settings
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"logging.wandb_project={self.project}: Weights & Biases does not start ({reason}); "
                "run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        store_run_id(state, "wandb", self._run.id)
        place = self._run.dir if self._run.offline else self._run.url
        logger.info("Weights & Biases: run %s, %s", self._run.id, place)

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """Send a step's scalars when one is due."""
        if self._run is not None and state.is_due(self.interval_steps):
            self._run.log(step_scalars(record), step=record.step)

    def on_validation(self, state: TrainState, record: ValidationRecord) -> None:
        """Send the held-out losses."""
        if self._run is not None:
            self._run.log(validation_scalars(record), step=record.step)

    def on_fit_end(self, state: TrainState) -> None:
        """Finish the run."""
        self._finish(exit_code=0)

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Mark the run as failed."""
        self._finish(exit_code=1)

    def _finish(self, *, exit_code: int) -> None:
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None
