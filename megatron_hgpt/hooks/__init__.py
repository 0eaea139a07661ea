"""Side effects of training (console, files, TensorBoard and other trackers, throughput, watchdog).

The trainer knows `Hook` only.

Must not import: model, engines, checkpoint, trainer, inference.
"""

from __future__ import annotations

from megatron_hgpt.config import RunConfig
from megatron_hgpt.environment import started_by_ft_launcher
from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState, ValidationRecord
from megatron_hgpt.hooks.console import ConsoleHook
from megatron_hgpt.hooks.fault_tolerance import FaultToleranceHook
from megatron_hgpt.hooks.image_samples import ImageSamplesHook, SampleImages
from megatron_hgpt.hooks.metrics import MetricsHook
from megatron_hgpt.hooks.mlflow_tracking import MLflowHook
from megatron_hgpt.hooks.tensorboard import TensorBoardHook
from megatron_hgpt.hooks.throughput import PathParameters, ThroughputHook
from megatron_hgpt.hooks.watchdog import WatchdogHook
from megatron_hgpt.hooks.weights_and_biases import WeightsAndBiasesHook

__all__ = [
    "Hook",
    "PathParameters",
    "SampleImages",
    "StepRecord",
    "TrainState",
    "ValidationRecord",
    "WatchdogHook",
    "build_hooks",
]


def build_hooks(
    config: RunConfig,
    *,
    world_size: int = 1,
    watchdog: WatchdogHook | None = None,
    parameters: PathParameters | None = None,
    sample_images: SampleImages | None = None,
) -> list[Hook]:
    """The hooks that `config.logging` asks for, the same list on every rank.

    Args:
        world_size: ranks of the whole job.
        watchdog: of this process, started already; None goes without.
        parameters: counts for the 4N rule; None leaves the throughput line out.
        sample_images: draws sample images on all ranks together; used when
            `logging.sample_images_interval_steps` is positive.
    """
    logging = config.logging
    interval = logging.interval_steps
    tensorboard = TensorBoardHook(interval_steps=interval) if logging.tensorboard else None
    metrics = MetricsHook(interval_steps=interval)
    hooks: list[Hook] = [metrics]
    if watchdog is not None:
        hooks.append(watchdog)
    if started_by_ft_launcher():
        hooks.append(FaultToleranceHook())
    if parameters is not None:
        hooks.append(ThroughputHook(parameters=parameters, world_size=world_size))
    if sample_images is not None and logging.sample_images_interval_steps > 0:
        every = logging.sample_images_interval_steps
        hooks.append(ImageSamplesHook(interval_steps=every, sample_images=sample_images, tensorboard=tensorboard))
    if tensorboard is not None:
        hooks.append(tensorboard)  # after the images: its on_fit_end closes the file they are written to
    if logging.wandb_project is not None:
        hooks.append(WeightsAndBiasesHook(project=logging.wandb_project, interval_steps=interval))
    if logging.mlflow_experiment is not None:
        hooks.append(MLflowHook(experiment=logging.mlflow_experiment, interval_steps=interval))
    # Last: its summary closes the output, and it shows what the metrics have summed up.
    hooks.append(ConsoleHook(metrics=metrics, interval_steps=interval, progress_bar=logging.progress_bar))
    return hooks
