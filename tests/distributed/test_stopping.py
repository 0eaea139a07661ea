"""A run that ends early: a signal during validation, a validation or a hook that fails, a start that is refused."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hgpt.config import ParallelConfig, TrainingConfig
from megatron_hgpt.data.validation_loader import ValidationChunk
from megatron_hgpt.errors import CheckpointError, DataError
from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState, ValidationRecord
from megatron_hgpt.hooks.metrics import MetricsHook
from megatron_hgpt.samples import Task
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import make_micro_batch, tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer
from megatron_hgpt.trainer import Trainer

NUM_STEPS = 4


class HeldOut:
    """Stands for the validation loader: two chunks, and something that happens after one of them."""

    def __init__(self, rank: int, event: str) -> None:
        self.rank, self.event = rank, event

    def chunks(self) -> Iterator[ValidationChunk]:
        for number in (1, 2):
            yield ValidationChunk(batches=[make_micro_batch(f"chunk {number}", Task.GENERATION)], is_counted=[True])
            if self.event == "fails":
                raise DataError("a bad sample")
            if self.rank == 1 and self.event == f"signal after chunk {number}":
                os.kill(os.getpid(), signal.SIGTERM)


class Recorder(Hook):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        self.calls.append(f"step {record.step}")

    def on_validation(self, state: TrainState, record: ValidationRecord) -> None:
        self.calls.append(f"validation {record.step}")

    def on_checkpoint_saved(self, state: TrainState, checkpoint: object) -> None:
        self.calls.append(f"checkpoint {state.step}")

    def on_fit_end(self, state: TrainState) -> None:
        self.calls.append("end")

    def on_error(self, state: TrainState, error: BaseException) -> None:
        self.calls.append(f"error: {error}")


class Careless(Hook):
    def on_error(self, state: TrainState, error: BaseException) -> None:
        raise ValueError("this hook cannot cope")


class SignalInSave(Hook):
    def on_checkpoint_saved(self, state: TrainState, checkpoint: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def make_trainer(backbone: Path, folder: Path, hooks: list[Hook], save_interval: int, **training: int) -> Trainer:
    from megatron_hgpt import distributed

    settings = {"num_steps": NUM_STEPS, "validation_interval_steps": 2, **training}
    stage = TrainingConfig(precision="fp32", micro_batch_size=2, global_batch_size=8, **settings)  # type: ignore[arg-type]
    config = tiny_config(backbone, folder, training=stage)
    config.checkpoint.save_interval_steps = save_interval
    context = distributed.initialize(ParallelConfig(), seed=1)
    return build_trainer(config, context, hooks=hooks)


def fit(backbone: Path, folder: Path, event: str, save_interval: int) -> tuple[list[str], list[str]]:
    """The hook's calls, and the trainer's lines."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_hgpt.trainer").addHandler(handler)
    recorder = Recorder()
    trainer = make_trainer(backbone, folder, [MetricsHook(), Careless(), recorder], save_interval)
    if event == "signal in save" and trainer.context.rank == 1:
        trainer.hooks.append(SignalInSave())
    trainer.validation = HeldOut(trainer.context.rank, event)  # type: ignore[assignment]
    if event == "fails":
        with pytest.raises(DataError, match="a bad sample"):
            trainer.fit()
    else:
        trainer.fit()
    return recorder.calls, lines


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbones") / "phi3")


def test_validation_follows_the_checkpoint_of_its_step(backbone: Path, tmp_path: Path) -> None:
    ((calls, _),) = run_ranks(fit, 1, backbone, tmp_path, "nothing", 2)
    second = ["step 3", "step 4", "checkpoint 4", "validation 4", "end"]
    assert calls == ["step 1", "step 2", "checkpoint 2", "validation 2", *second]


def test_a_failing_validation_loses_no_training(backbone: Path, tmp_path: Path) -> None:
    ((calls, lines),) = run_ranks(fit, 1, backbone, tmp_path, "fails", 2)
    assert calls == ["step 1", "step 2", "checkpoint 2", "error: a bad sample"], "though another hook failed before"
    assert (tmp_path / "checkpoints" / "step_00000002" / "healthgpt.json").is_file()
    assert lines == ["Careless.on_error failed (ValueError: this hook cannot cope)"]


@pytest.mark.parametrize("save_interval", [2, 1000], ids=["saved before", "not saved before"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_signal_during_validation_ends_the_run_at_once(
    number: int, save_interval: int, backbone: Path, tmp_path: Path
) -> None:
    """The signal reaches one rank of two."""
    for calls, lines in run_ranks(fit, 2, backbone, tmp_path, f"signal after chunk {number}", save_interval):
        figures = ["validation 2"] if number == 2 else []
        rest = ["checkpoint 2", *figures] if save_interval == 2 else [*figures, "checkpoint 2"]
        assert calls == ["step 1", "step 2", *rest, "end"]
        left_out = ["validation at step 2 is left out: a signal asked to stop"] if number == 1 else []
        assert lines == [*left_out, "stopped by a signal after step 2; start again to resume"]
    assert (tmp_path / "validation.jsonl").exists() == (number == 2), "no half figures"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_signal_during_a_save_costs_no_further_step(backbone: Path, tmp_path: Path) -> None:
    for calls, lines in run_ranks(fit, 2, backbone, tmp_path, "signal in save", 1):
        assert calls == ["step 1", "checkpoint 1", "end"]
        assert lines == ["stopped by a signal after step 1; start again to resume"]


def refused_start(backbone: Path, folder: Path) -> tuple[str, str]:
    """resolved_config.yaml after a run, and after another stage's start in the same folder."""
    texts = []
    make_trainer(backbone, folder, [], 1000, num_steps=1).fit()
    texts.append((folder / "resolved_config.yaml").read_text())
    trainer = make_trainer(backbone, folder, [], 1000, num_steps=2)
    trainer.config.training.stage = "stage1_generation"
    with pytest.raises(CheckpointError, match="give each stage its output_dir"):
        trainer.fit()
    texts.append((folder / "resolved_config.yaml").read_text())
    return texts[0], texts[1]


def test_a_refused_start_leaves_the_configuration_that_is_there(backbone: Path, tmp_path: Path) -> None:
    ((before, after),) = run_ranks(refused_start, 1, backbone, tmp_path)
    assert before == after and "num_steps: 1\n" in before
