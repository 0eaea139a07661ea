"""The training loop: steps, schedule, validation, checkpoints, hooks. Knows nothing of H-LoRA or images."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megatron_hgpt.anomaly import AnomalyGuard
from megatron_hgpt.config_io import save_config
from megatron_hgpt.engines import build_engine
from megatron_hgpt.forward_step import LossTotals
from megatron_hgpt.gradient_audit import GradientAudit
from megatron_hgpt.hooks.base import Anomaly, Phase, StepRecord, TrainState, ValidationRecord
from megatron_hgpt.hooks.tolerance import Tolerance
from megatron_hgpt.interruption import StopSignals
from megatron_hgpt.optim import build_scheduler, learning_rates, mark_idle_groups
from megatron_hgpt.parameters import named_parameters

if TYPE_CHECKING:
    from megatron_hgpt.checkpoint import Checkpointer, Restored
    from megatron_hgpt.config import RunConfig
    from megatron_hgpt.data.validation_loader import ValidationLoader
    from megatron_hgpt.distributed import DistributedContext
    from megatron_hgpt.hooks.base import Hook
    from megatron_hgpt.model.healthgpt import HealthGPT
    from megatron_hgpt.samples import MicroBatch
    from megatron_hgpt.stages import Stage

logger = logging.getLogger(__name__)


class StepLoader(Protocol):
    """What the trainer needs of a loader; see `data.loader.TrainLoader`."""

    counts: Counter[str]
    """Samples of this rank that were truncated, and skipped by reason."""

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """The position, for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""


class Trainer:
    """Trains one stage.

    Args:
        config: the run.
        stage: the resolved row of the stage table.
        context: this process's place in the layout.
        models: the bare model of this pipeline stage, or its interleaved chunks, frozen except for the stage's groups.
        loader: yields this rank's micro-batches per step (`data.loader.TrainLoader`).
        total_steps: optimizer steps of the stage.
        checkpointer: saves and restores.
        hooks: side effects.
        validation: the held-out samples; None where there are none.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        stage: Stage,
        context: DistributedContext,
        models: Sequence[HealthGPT],
        loader: StepLoader,
        total_steps: int,
        checkpointer: Checkpointer,
        hooks: Sequence[Hook] = (),
        validation: ValidationLoader | None = None,
    ) -> None:
        self.config, self.stage, self.context = config, stage, context
        self.models, self.loader, self.total_steps = list(models), loader, total_steps
        self.checkpointer, self.hooks, self.validation = checkpointer, list(hooks), validation
        self.step = 0
        self.signals = StopSignals()
        self.audit = GradientAudit(named_parameters(self.models))
        self.anomalies = AnomalyGuard(config.anomaly, context)
        self.engine = build_engine(config, stage, context, self.models)
        self.scheduler = build_scheduler(config, stage, self.engine.optimizer, total_steps)

    @property
    def state(self) -> TrainState:
        """What hooks are told."""
        return TrainState(
            step=self.step,
            total_steps=self.total_steps,
            stage=self.config.training.stage,
            output_dir=Path(self.config.output_dir),
            is_writer=self.context.is_writer,
            config=self.config,
            model=self.models[0],
        )

    def fit(self) -> int:
        """Train from the current step (0, or a restored one) to the last; saves, and calls the hooks.

        Returns:
            0, or on every rank the number of the signal that stopped the run before its last step.
        """
        self.signals.listen()
        try:
            self._restore()
            self.checkpointer.prepare(self.models, self.engine)
            for hook in self.hooks:
                hook.on_fit_start(self.state)
            if self.context.is_writer:
                # Only now is the run accepted: a refused start leaves the file of the run that is there.
                path = Path(self.config.output_dir) / "resolved_config.yaml"
                with Tolerance().writing(path):
                    save_config(self.config, path)
            while self.step < self.total_steps:
                record = self.train_step()
                self._enter(Phase.REPORT)
                if record.anomaly is not None and self._went_back(record, record.anomaly):
                    continue
                for hook in self.hooks:
                    hook.on_step_end(self.state, record)
                if self._save_and_validate():
                    if self.step < self.total_steps:
                        logger.warning("stopped by a signal after step %d; start again to resume", self.step)
                    break
            self._enter(Phase.END)
            finished = dataclasses.replace(self.state, sample_counts=self._sample_counts())
            for hook in self.hooks:
                hook.on_fit_end(finished)
            return self.signals.number if self.step < self.total_steps else 0
        except BaseException as error:
            # Peers may sit in a collective that this rank will never join: no communication from here on.
            self._tell_of_error(error)
            raise
        finally:
            self.signals.leave()

    def train_step(self) -> StepRecord:
        """One optimizer step over the global batch; of an abnormal one the record says what became of it.

        Raises:
            DivergedError: the loss or the gradient is not finite, or the loss jumped, and `config.anomaly` says stop.
        """
        started = time.perf_counter()
        self._enter(Phase.LOAD)
        batches = self.loader.next_step()
        self._enter(Phase.COMPUTE)
        totals = LossTotals()
        reports = self.engine.accumulate(batches)
        for report in reports:
            totals.add(report)
        self.audit.check(batches)
        totals.reduce(self.context)
        self._enter(Phase.UPDATE)
        mark_idle_groups(self.engine.optimizer, totals.trained_tasks)
        self.scheduler.step(1)
        rates = learning_rates(self.engine.optimizer)
        self.step += 1
        is_finite = self.engine.has_finite_gradient
        anomaly = self.anomalies.judge(self.step, batches, reports, totals, has_finite_gradient=is_finite)
        grad_norm = math.nan
        if anomaly is None or anomaly.action == "warn":
            grad_norm = self.engine.step()
            anomaly = self.anomalies.settle(self.step, grad_norm, anomaly)
        return self._record(totals, rates, grad_norm, time.perf_counter() - started, anomaly)

    def validate(self) -> ValidationRecord | None:
        """Loss per task over the held-out samples, alike on every rank; training goes on as if it had not been.

        Returns:
            The figures; None where a signal asked to stop before all samples were through, and nothing is recorded.
        """
        assert self.validation is not None
        for hook in self.hooks:
            hook.on_validation_start(self.state)
        started = time.perf_counter()
        totals = {task: LossTotals() for task in self.stage.tasks}
        for chunk in self.validation.chunks():
            self._enter(Phase.VALIDATE)
            if self.signals.agree(self.context):
                logger.warning("validation at step %d is left out: a signal asked to stop", self.step)
                return None
            reports = self.engine.evaluate(chunk.batches)
            # Only the last pipeline stage has reports.
            for report, batch, is_counted in zip(reports, chunk.batches, chunk.is_counted, strict=False):
                if is_counted and batch.task is not None:
                    totals[batch.task].add(report)
        for total in totals.values():
            total.reduce(self.context)
        losses = [total.all_tasks for total in totals.values()]
        num_tokens = sum(float(loss.num_tokens) for loss in losses)
        record = ValidationRecord(
            step=self.step,
            loss=sum(float(loss.loss_sum) for loss in losses) / max(num_tokens, 1.0),
            loss_per_task={task: loss for total in totals.values() for task, loss in total.loss_per_task.items()},
            num_samples_per_task={task.value: int(total.num_samples) for task, total in totals.items()},
            num_tokens=int(num_tokens),
            time_s=time.perf_counter() - started,
        )
        for hook in self.hooks:
            hook.on_validation(self.state, record)
        return record

    def _save_and_validate(self) -> bool:
        """What is due after a step; True on every rank when the run is to stop here, and its checkpoint is complete."""
        stop, is_last = self.signals.agree(self.context), self.step == self.total_steps
        save = stop or is_last or self.step % max(self.config.checkpoint.save_interval_steps, 1) == 0
        validate = not stop and self._is_validation_due()
        if save:
            self._save()
        # Complete before validation starts, and so not lost if that fails.
        is_saved = self._announce_checkpoints(wait=validate, is_final=stop or is_last)
        if validate:
            self.validate()
        if not stop and (save or validate):
            stop = self.signals.agree(self.context)  # a signal that came meanwhile costs no further step
            # What was to be saved may have failed, which the stop's exit status must not hide.
            if stop and not (is_saved or self._announce_checkpoints(wait=True)):
                self._save()
                self._announce_checkpoints(is_final=True)
        return stop

    def _save(self) -> None:
        self._enter(Phase.SAVE)
        self.checkpointer.save(
            self.models,
            self.engine,
            step=self.step,
            loader_state=self.loader.state_dict(),
            is_healthy=self.anomalies.is_healthy,
        )
        self._enter(Phase.REPORT)

    def _enter(self, phase: Phase) -> None:
        for hook in self.hooks:
            hook.on_phase(self.state, phase)

    def _went_back(self, record: StepRecord, anomaly: Anomaly) -> bool:
        """Say what became of an abnormal step, after going back where that was decided; True when training did."""
        if anomaly.action == "rollback":
            record.anomaly = anomaly = self._roll_back(anomaly)
        outcome = {
            "warn": "the update was made all the same",
            "skip": "its update is left out",
            "rollback": f"back to step {anomaly.back_to_step}, and on with the samples behind step {anomaly.step}",
        }
        logger.warning("step %d: %s: %s", anomaly.step, anomaly.text, outcome[anomaly.action])
        for hook in self.hooks:
            hook.on_anomaly(self.state, anomaly)
        return anomaly.action == "rollback"

    def _roll_back(self, anomaly: Anomaly) -> Anomaly:
        """Weights, optimizer, schedule and random states of the newest healthy checkpoint; the loader stays ahead."""
        self._announce_checkpoints(wait=True)
        self._enter(Phase.START)
        restored = self.checkpointer.restore_latest(self.models, self.engine, healthy_only=True)
        if restored is None:
            return self.anomalies.skip_instead(anomaly)
        self._go_on_from(restored)
        return dataclasses.replace(anomaly, back_to_step=restored.step)

    def _is_validation_due(self) -> bool:
        interval = self.config.training.validation_interval_steps
        is_due = self.step == self.total_steps or (interval > 0 and self.step % interval == 0)
        return self.validation is not None and is_due

    def _record(
        self,
        totals: LossTotals,
        rates: dict[str, float],
        grad_norm: float,
        seconds: float,
        anomaly: Anomaly | None,
    ) -> StepRecord:
        every = totals.all_tasks
        return StepRecord(
            step=self.step,
            loss=every.mean,
            loss_per_task=totals.loss_per_task,
            num_supervised_tokens=int(every.num_tokens),
            num_tokens=int(totals.num_content_tokens),
            num_samples=int(totals.num_samples),
            padding_share=1 - totals.num_content_tokens / max(totals.num_positions, 1.0),
            learning_rates=rates,
            grad_norm=grad_norm,
            step_time_s=seconds,
            tokens_per_s=totals.num_content_tokens / seconds,
            anomaly=anomaly,
        )

    def _restore(self) -> None:
        """Go on from the newest healthy checkpoint, or where there is none from the newest."""
        if not self.config.checkpoint.resume:
            return
        restored = self.checkpointer.restore_latest(self.models, self.engine, healthy_only=True)
        restored = restored or self.checkpointer.restore_latest(self.models, self.engine)
        if restored is None:
            return
        self.loader.load_state_dict(restored.loader_state)
        self._go_on_from(restored)
        logger.info("resumed from %s: %d of %d steps are done", restored.path, self.step, self.total_steps)
        for change in restored.changes:
            logger.info("changed since that checkpoint: %s", change)

    def _go_on_from(self, restored: Restored) -> None:
        self.step = restored.step
        self.scheduler.num_steps = restored.step
        self.scheduler.step(0)

    def _announce_checkpoints(self, *, wait: bool = False, is_final: bool = False) -> bool:
        """Tell the hooks of what became complete; True on every rank where this step's checkpoint did."""
        if wait or is_final:
            self._enter(Phase.SAVE)
        checkpoints = self.checkpointer.published(wait=wait, is_final=is_final)
        if wait or is_final:
            self._enter(Phase.REPORT)
        for checkpoint in checkpoints:
            for hook in self.hooks:
                hook.on_checkpoint_saved(self.state, checkpoint)
        return any(checkpoint.path.name == f"step_{self.step:08d}" for checkpoint in checkpoints)

    def _tell_of_error(self, error: BaseException) -> None:
        """Every hook hears of it, whatever becomes of another hook's handling."""
        for hook in self.hooks:
            try:
                hook.on_error(self.state, error)
            except Exception as failure:
                reason = " ".join(str(failure).split())
                logger.warning("%s.on_error failed (%s: %s)", type(hook).__name__, type(failure).__name__, reason)

    def _sample_counts(self) -> dict[str, int]:
        """Truncated and skipped samples over the data-parallel ranks; every rank must call it."""
        from megatron.core import parallel_state

        counts: list[Any] = [None] * self.context.dp_size
        group = parallel_state.get_data_parallel_group()
        torch.distributed.all_gather_object(counts, dict(self.loader.counts), group=group)
        return dict(sum(map(Counter, counts), Counter()))
