"""What runs forward, backward and the optimizer step: Megatron-Core (default) or DeepSpeed, behind one interface.

Must not import: data, checkpoint, hooks, trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_hgpt.config import RunConfig
from megatron_hgpt.distributed import DistributedContext
from megatron_hgpt.engines.base import OptimizerState, TrainingEngine
from megatron_hgpt.stages import Stage

if TYPE_CHECKING:
    from megatron_hgpt.model.healthgpt import HealthGPT

__all__ = ["OptimizerState", "TrainingEngine", "build_engine"]


def build_engine(
    config: RunConfig, stage: Stage, context: DistributedContext, models: Sequence[HealthGPT]
) -> TrainingEngine:
    """The engine that `config.engine` names, around the bare (already frozen) model or its interleaved chunks.

    Raises:
        ConfigError: DeepSpeed refuses a value of `engine.overrides`.
    """
    if config.engine.name == "deepspeed":
        from megatron_hgpt.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, stage, context, models[0])
    from megatron_hgpt.engines.megatron import MegatronEngine

    return MegatronEngine(config, stage, models)
