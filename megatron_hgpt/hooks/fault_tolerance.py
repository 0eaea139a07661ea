"""Heartbeats for `ft_launcher` of nvidia-resiliency-ext, which ends and restarts a rank that stops sending them."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from megatron_hgpt.errors import ConfigError
from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState, ValidationRecord

if TYPE_CHECKING:
    from megatron_hgpt.checkpoint import SavedCheckpoint


class FaultToleranceHook(Hook):
    """Tells the rank monitor of this process, which `ft_launcher` started, that it makes progress.

    The first beat comes when training starts, so `ft_initial_rank_heartbeat_timeout` covers reading the weights; the
    others come with every step, validation and checkpoint.

    Raises:
        ConfigError: the launcher is there and its package is not.
    """

    def __init__(self) -> None:
        try:
            package = importlib.import_module("nvidia_resiliency_ext.fault_tolerance")
        except ImportError as error:
            raise ConfigError(f"started by ft_launcher, but without its package here: {error}") from error
        self._client: Any = package.RankMonitorClient()

    def on_fit_start(self, state: TrainState) -> None:
        """Meet the monitor."""
        self._client.init_workload_monitoring()
        self._client.send_heartbeat()

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """A beat."""
        self._client.send_heartbeat()

    def on_validation(self, state: TrainState, record: ValidationRecord) -> None:
        """A beat."""
        self._client.send_heartbeat()

    def on_checkpoint_saved(self, state: TrainState, checkpoint: SavedCheckpoint) -> None:
        """A beat."""
        self._client.send_heartbeat()

    def on_fit_end(self, state: TrainState) -> None:
        """The rest is not watched."""
        self._client.shutdown_workload_monitoring()

    def on_error(self, state: TrainState, error: BaseException) -> None:
        """The launcher sees the process end."""
        with contextlib.suppress(OSError):
            self._client.shutdown_workload_monitoring()
