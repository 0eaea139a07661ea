"""Scalars and configuration to MLflow, through its own library: in <output_dir>/mlruns, or to MLFLOW_TRACKING_URI."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from megatron_hgpt.config_io import to_dict
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState, ValidationRecord
from megatron_hgpt.hooks.external import flat, import_tracker, run_id_file, store_run_id, stored_run_id
from megatron_hgpt.hooks.figures import step_scalars, validation_scalars

logger = logging.getLogger(__name__)

_MAX_PARAMS = 100
"""Per request to a tracking server."""

_MAX_PARAM_LENGTH = 500
"""Characters of a value that every version of a server takes."""


class MLflowHook(Hook):
    """A run named after the configuration, with TensorBoard's scalars; a resumed run goes on as the same one.

    Parameters are those of the run's first start: MLflow does not let them change.

    Args:
        experiment: `logging.mlflow_experiment`.
        interval_steps: optimizer steps between records.
    """

    def __init__(self, *, experiment: str, interval_steps: int = 1) -> None:
        self.experiment = experiment
        self.interval_steps = interval_steps
        self._client: Any = None
        self._run_id = ""
        self._mlflow: ModuleType | None = None

    def on_fit_start(self, state: TrainState) -> None:
        """Start the run, or the next part of it.

        Raises:
            ConfigError: mlflow is not installed, or its server refuses the run.
        """
        if not state.is_writer:
            return
        # It would report its use to its makers; and newer versions keep files only where they are told to.
        defaults = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
        mlflow = import_tracker("mlflow", field="logging.mlflow_experiment", package="mlflow-skinny", defaults=defaults)
        local = None if mlflow.tracking.is_tracking_uri_set() else (state.output_dir / "mlruns").resolve().as_uri()
        self._mlflow, self._client = mlflow, mlflow.MlflowClient(tracking_uri=local)
        stored = stored_run_id(state, "mlflow")
        try:
            self._run_id = self._start(state, stored)
        except mlflow.MlflowException as error:
            resumed = f"; to begin a new run instead of run {stored}, delete {run_id_file(state, 'mlflow')}"
            raise ConfigError(
                f"logging.mlflow_experiment={self.experiment}: MLflow does not start ({' '.join(str(error).split())}); "
                "check MLFLOW_TRACKING_URI, or unset it to keep files in output_dir" + (resumed if stored else "")
            ) from error
        logger.info("MLflow: run %s, %s", self._run_id, local or mlflow.get_tracking_uri())

    def _start(self, state: TrainState, stored: str | None) -> str:
        """The id of the run that goes on, or of a new one with its parameters."""
        assert self._mlflow is not None
        if stored is not None:
            self._client.update_run(stored, status="RUNNING")
            return stored
        known = self._client.get_experiment_by_name(self.experiment)
        experiment = self._client.create_experiment(self.experiment) if known is None else known.experiment_id
        run_id: str = self._client.create_run(experiment, run_name=f"{state.config.name} {state.stage}").info.run_id
        store_run_id(state, "mlflow", run_id)
        param = self._mlflow.entities.Param
        params = [param(name, str(value)[:_MAX_PARAM_LENGTH]) for name, value in flat(to_dict(state.config))]
        for first in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + _MAX_PARAMS])
        return run_id

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """Send a step's scalars when one is due."""
        if state.is_due(self.interval_steps):
            self._log(step_scalars(record), record.step)

    def on_validation(self, state: TrainState, record: ValidationRecord) -> None:
        """Send the held-out losses."""
        self._log(validation_scalars(record), record.step)

    def on_fit_end(self, state: TrainState) -> None:
        """Finish the run."""
        self._finish("FINISHED" if state.step >= state.total_steps else "KILLED")

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """Mark the run as failed."""
        self._finish("FAILED")

    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        if self._client is None or self._mlflow is None:
            return
        now_ms = int(time.time() * 1000)
        metrics = [self._mlflow.entities.Metric(name, value, now_ms, step) for name, value in scalars.items()]
        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except self._mlflow.MlflowException as error:
            # Each further try would wait for the server again: training is worth more than its record.
            logger.warning("MLflow takes no more records from step %d on: %s", step, " ".join(str(error).split()))
            self._client = None

    def _finish(self, status: str) -> None:
        if self._client is None or self._mlflow is None:
            return
        try:
            self._client.set_terminated(self._run_id, status=status)
        except self._mlflow.MlflowException as error:
            logger.warning("MLflow was not told that the run is %s: %s", status, " ".join(str(error).split()))
        self._client = None
