"""What a run tells its user on real processes: settings that changed since the checkpoint, samples of all ranks."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_hgpt.config import CheckpointConfig, TrainingConfig
from megatron_hgpt.hooks.base import Hook, TrainState
from megatron_hgpt.samples import MicroBatch
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import FixedLoader, tiny_config, write_backbone
from megatron_hgpt.testing.training import build_trainer


class CountingLoader(FixedLoader):
    """Every step truncates a sample on each rank, and the second rank skips one."""

    def next_step(self) -> list[MicroBatch]:
        self.counts.update({"truncated": 1, "skipped/unreadable_image": self.dp_rank})
        return super().next_step()


class Counts(Hook):
    def __init__(self) -> None:
        self.at_the_end: dict[str, int] = {}

    def on_fit_end(self, state: TrainState) -> None:
        self.at_the_end = state.sample_counts


def fit(backbone: Path, folder: Path, num_steps: int, lr: float) -> tuple[list[str], dict[str, int]]:
    """The lines of trainer and checkpointer before the first step, and the counts at the end."""
    from megatron_hgpt import distributed

    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    trainer_log = logging.getLogger("megatron_hgpt.trainer")
    trainer_log.addHandler(Lines())
    logging.getLogger("megatron_hgpt.checkpoint.random_states").addHandler(Lines())
    trainer_log.setLevel(logging.INFO)
    training = TrainingConfig(num_steps=num_steps, precision="fp32", micro_batch_size=2, global_batch_size=8)
    config = tiny_config(backbone, folder, training=training, checkpoint=CheckpointConfig(save_interval_steps=1000))
    config.optimizer.lr = lr
    context = distributed.initialize(config.parallel, seed=1)
    counts = Counts()
    build_trainer(config, context, loader_class=CountingLoader, hooks=[counts]).fit()
    return lines, counts.at_the_end


def test_a_resumed_run_says_what_changed_and_counts_samples_of_all_ranks(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "phi3")
    for lines, counts in run_ranks(fit, 2, backbone, tmp_path / "run", 2, 5e-3):
        assert lines == []
        assert Counter(counts) == {"truncated": 4, "skipped/unreadable_image": 2}
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    for lines, counts in run_ranks(fit, 2, backbone, tmp_path / "run", 3, 1e-3):
        assert lines == [
            f"resumed from {checkpoint}: 2 of 3 steps are done",
            "changed since that checkpoint: optimizer.lr: 0.005 -> 0.001",
            "changed since that checkpoint: training.num_steps: 2 -> 3",
        ]
        assert Counter(counts) == {"truncated": 2, "skipped/unreadable_image": 1}, "of this process only"
    ((lines, _),) = run_ranks(fit, 1, backbone, tmp_path / "run", 3, 1e-3)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    assert lines == [
        f"{checkpoint} was saved at pipeline 1 x tensor 1 x data and context 2 and goes on at pipeline 1 x tensor 1 x "
        "data and context 1: dropout draws anew",
        f"resumed from {checkpoint}: 3 of 3 steps are done",
    ]


def test_the_console_shows_time_and_message(tmp_path: Path) -> None:
    from megatron_hgpt.cli.frame import ConsoleFormatter

    def shown(level: int, message: str, *args: Any) -> str:
        record = logging.LogRecord("megatron_hgpt.somewhere", level, __file__, 1, message, args, None)
        time, text = ConsoleFormatter().format(record).split(" ", 1)
        assert [len(part) for part in time.split(":")] == [2, 2, 2]
        return text

    assert shown(logging.INFO, "step %d", 3) == "step 3"
    assert shown(logging.WARNING, "a bad sample") == "warning: a bad sample"
    assert shown(logging.ERROR, "lost") == "error: lost"
