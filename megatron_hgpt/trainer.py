"""The training loop: steps, schedule, checkpoints, hooks. Knows nothing of H-LoRA or images."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from megatron_hgpt.checkpoint import Checkpointer
from megatron_hgpt.config import RunConfig
from megatron_hgpt.distributed import DistributedContext
from megatron_hgpt.engines import build_engine
from megatron_hgpt.forward_step import LossTotals
from megatron_hgpt.gradient_audit import GradientAudit
from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState
from megatron_hgpt.optim import build_scheduler, learning_rates, mark_idle_groups
from megatron_hgpt.parameters import named_parameters
from megatron_hgpt.samples import MicroBatch
from megatron_hgpt.stages import Stage

logger = logging.getLogger(__name__)


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
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        stage: Stage,
        context: DistributedContext,
        models: Sequence[Any],
        loader: Any,
        total_steps: int,
        checkpointer: Checkpointer,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.config, self.stage, self.context = config, stage, context
        self.models, self.loader, self.total_steps = list(models), loader, total_steps
        self.checkpointer, self.hooks = checkpointer, list(hooks)
        self.step = 0
        self._stop_requested = False
        self.audit = GradientAudit(named_parameters(self.models))
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

    def fit(self) -> None:
        """Train from the current step (0, or a restored one) to the last; saves, and calls the hooks."""
        previous = self._listen_for_termination()
        try:
            self._restore()
            for hook in self.hooks:
                hook.on_fit_start(self.state)
            while self.step < self.total_steps:
                record = self.train_step()
                for hook in self.hooks:
                    hook.on_step_end(self.state, record)
                stop = self._agree_to_stop()
                due = self.step % max(self.config.checkpoint.save_interval_steps, 1) == 0
                if due or stop or self.step == self.total_steps:
                    self.checkpointer.save(
                        self.models, self.engine, step=self.step, loader_state=self.loader.state_dict()
                    )
                self._announce_checkpoints(wait=stop or self.step == self.total_steps)
                if stop:
                    logger.warning("stopped by a signal after step %d; start again to resume", self.step)
                    break
            for hook in self.hooks:
                hook.on_fit_end(self.state)
        except BaseException as error:
            # Peers may sit in a collective that this rank will never join: no communication from here on.
            for hook in self.hooks:
                hook.on_error(self.state, error)
            raise
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def train_step(self) -> StepRecord:
        """One optimizer step over the global batch."""
        started = time.perf_counter()
        batches: list[MicroBatch] = self.loader.next_step()
        totals = LossTotals()
        for report in self.engine.accumulate(batches):
            totals.add(report)
        self.audit.check(batches)
        totals.reduce(self.context)
        mark_idle_groups(self.engine.optimizer, totals.trained_tasks)
        self.scheduler.step(1)
        rates = learning_rates(self.engine.optimizer)
        grad_norm = self.engine.step()
        self.step += 1
        return self._record(totals, rates, grad_norm, time.perf_counter() - started)

    def _record(self, totals: LossTotals, rates: dict[str, float], grad_norm: float, seconds: float) -> StepRecord:
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
        )

    def _restore(self) -> None:
        restored = self.checkpointer.restore_latest(self.models, self.engine) if self.config.checkpoint.resume else None
        if restored is None:
            return
        self.step = restored.step
        self.loader.load_state_dict(restored.loader_state)
        self.scheduler.num_steps = restored.step
        self.scheduler.step(0)
        logger.info("resumed %s at step %d of %d", restored.path, self.step, self.total_steps)

    def _announce_checkpoints(self, *, wait: bool) -> None:
        for path in self.checkpointer.published(wait=wait):
            for hook in self.hooks:
                hook.on_checkpoint_saved(self.state, path)

    def _listen_for_termination(self) -> dict[int, Any]:
        """Finish the step and save on SIGTERM and SIGINT (Slurm, Ctrl-C); a second signal ends the process at once."""

        def request_stop(signum: int, _frame: FrameType | None) -> None:
            self._stop_requested = True
            signal.signal(signum, signal.SIG_DFL)

        previous: dict[int, Callable | int | None] = {}
        for signum in (signal.SIGTERM, signal.SIGINT):
            try:
                previous[signum] = signal.signal(signum, request_stop)
            except ValueError:  # not the main thread: the embedding program keeps its own handlers
                break
        return previous

    def _agree_to_stop(self) -> bool:
        """True on every rank when any rank was asked to stop: a checkpoint needs all of them."""
        if self.context.world_size == 1:
            return self._stop_requested
        flag = torch.tensor([int(self._stop_requested)], device=self.context.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
