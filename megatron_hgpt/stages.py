"""The three-stage table (HealthGPT paper, section 4 and appendix): one row per run, read by trainer and dry run alike.
The groups of parameters are described in `megatron_hgpt.parameters`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_hgpt.config import TrainingConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.parameters import ADAPTER_GROUPS, parameter_groups
from megatron_hgpt.samples import Task


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage trains, on which tasks, and the published hyper-parameters that a configuration may override."""

    tasks: tuple[Task, ...]
    trainable: tuple[str, ...]
    lr: float
    adapter_lr: float
    """Learning rate of adapters that train beside other groups."""
    global_batch_size: int
    warmup_ratio: float = 0.03
    schedule: str = "cosine"
    dropout: Mapping[Task, float | None] = field(default_factory=dict)
    """H-LoRA dropout per task; None or absent keeps the plugin's own."""

    @property
    def parameter_groups(self) -> frozenset[str]:
        """Groups (`parameters.group_of`) whose parameters train; new_rows are a part of vocabulary."""
        return parameter_groups(self.trainable)

    def lr_of(self, group: str, lr: float | None = None, adapter_lr: float | None = None) -> float:
        """Peak learning rate of a group: adapters have their own unless they are all that trains."""
        base = self.lr if lr is None else lr
        if group in ADAPTER_GROUPS and set(self.trainable) - set(ADAPTER_GROUPS):
            return self.adapter_lr if adapter_lr is None else adapter_lr
        return base


_C, _G = Task.COMPREHENSION, Task.GENERATION

STAGES: Mapping[str, Stage] = {
    "stage1_comprehension": Stage(
        tasks=(_C,), trainable=("abstract_adapter",), lr=1e-3, adapter_lr=1e-3, global_batch_size=256, dropout={_C: 0.0}
    ),
    "stage1_generation": Stage(
        tasks=(_G,),
        trainable=("concrete_adapter", "hlora_generation", "new_rows"),
        lr=2e-4,
        adapter_lr=2e-5,
        global_batch_size=64,
    ),
    "stage1_joint": Stage(
        tasks=(_C, _G),
        trainable=("abstract_adapter", "concrete_adapter", "hlora_generation", "new_rows"),
        lr=2e-4,
        adapter_lr=1e-3,
        global_batch_size=256,
        dropout={_C: 0.0},
    ),
    "stage2": Stage(
        tasks=(_C, _G),
        trainable=("vocabulary",),
        lr=2e-4,
        adapter_lr=2e-5,
        global_batch_size=32,
        warmup_ratio=0.0,
        schedule="constant",
    ),
    "stage3_comprehension": Stage(
        tasks=(_C,),
        trainable=("abstract_adapter", "hlora_comprehension"),
        lr=2e-4,
        adapter_lr=2e-5,
        global_batch_size=128,
    ),
    "stage3_generation": Stage(
        tasks=(_G,), trainable=("concrete_adapter", "hlora_generation"), lr=2e-4, adapter_lr=2e-5, global_batch_size=64
    ),
    "stage3_joint": Stage(
        tasks=(_C, _G),
        trainable=("abstract_adapter", "concrete_adapter", "hlora_comprehension", "hlora_generation"),
        lr=2e-4,
        adapter_lr=2e-5,
        global_batch_size=128,
    ),
}
"""Joint rows train both tasks in one run, which is this project's extension; the paper runs them apart."""


LEARNING_RATES: Mapping[tuple[str, str], float] = {("healthgpt_l14", "stage1_generation"): 1e-4}
"""(Preset, stage) -> `Stage.lr` of a published model that has another one than the table."""


def resolve_stage(training: TrainingConfig) -> Stage:
    """The row of the table with the configuration's choices applied.

    Raises:
        ConfigError: unknown stage.
    """
    if training.stage not in STAGES:
        raise ConfigError(f"training.stage={training.stage!r} is unknown; use one of {', '.join(STAGES)}")
    stage = STAGES[training.stage]
    rows = {"rows": ("new_rows",), "full": ("vocabulary",), "none": ()}
    trainable: list[str] = []
    for group in stage.trainable:
        trainable.extend(rows[training.new_rows] if group == "new_rows" else (group,))
    if training.stage == "stage2" and training.train_adapters_in_stage2:
        trainable += list(ADAPTER_GROUPS)
    return dataclasses.replace(stage, trainable=tuple(trainable))
