"""What a plan is asked for, and the assumptions that it states."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_hgpt.backbone.implementation import LOCAL
from megatron_hgpt.backbone.shape import BackboneShape, read_backbone
from megatron_hgpt.config import ParallelConfig, Precision, Recompute, RunConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.planner.hardware import Cluster
from megatron_hgpt.samples import TASKS, Task
from megatron_hgpt.stages import Stage, resolve_stage
from megatron_hgpt.validation import validate

BYTES = {"bf16": 2, "fp8": 2, "fp32": 4}
"""Bytes of an activation and of a parameter; fp8 keeps both in bf16, with FP8 copies beside them."""
FP32_BYTES = 4
FIXED = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "virtual": "virtual_pipeline_model_parallel_size",
    "first_layers": "num_layers_in_first_pipeline_stage",
    "last_layers": "num_layers_in_last_pipeline_stage",
    "distributed_optimizer": "use_distributed_optimizer",
}
"""What a request may fix of the layout -> the option of section `parallel` that a user names for it."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Figures that no model or data sheet gives; every one is printed with the plan."""

    efficiency: float = 0.5
    """Share of the peak that GEMMs and attention reach."""
    network_efficiency: float = 0.8
    """Share of the links' bandwidth that collectives reach."""
    collective_latency_s: float = 10e-6
    """Start of one collective, seconds."""
    elementwise_passes: float = 4.0
    """Times that every saved activation byte crosses HBM outside the GEMMs: written and read, and its gradient."""
    reserve_gib: float = 4.0
    """CUDA context, NCCL buffers, allocator fragmentation and kernels' workspace, GiB."""

    def __post_init__(self) -> None:
        for name in ("efficiency", "network_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be above 0 and at most 1")
        for name in ("collective_latency_s", "elementwise_passes", "reserve_gib"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 0")


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """One question to the planner.

    Attributes:
        config: model, stage, micro and global batch size; its parallel section is ignored (`fixed_sizes` reads what a
            user names). Samples of `model.max_seq_length` tokens, not packed.
        precision: bf16, fp8 (GEMMs of the frozen linears in FP8) or fp32.
        recompute: none, selective (core attention) or full (every layer).
        supervised_tokens: supervised positions per sample, by task: all that head and loss work on.
        tensor, pipeline, context: fixed sizes; None tries every legal one.
        virtual: model chunks per pipeline stage.
        first_layers, last_layers: layers of the first and the last pipeline stage; None splits as equally as it goes.
        asked: the user's ``key=value`` beside the layout, repeated with the recommended layout.
    """

    config: RunConfig
    cluster: Cluster
    precision: Precision = "bf16"
    recompute: Recompute | Literal["none"] = "none"
    distributed_optimizer: bool = True
    supervised_tokens: dict[Task, int] = field(default_factory=dict)
    images_per_sample: int = 1
    tensor: int | None = None
    pipeline: int | None = None
    context: int | None = None
    virtual: int = 1
    first_layers: int | None = None
    last_layers: int | None = None
    asked: tuple[str, ...] = ()
    assumptions: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("precision", self.precision, tuple(BYTES)),
            ("recompute", self.recompute, ("none", "selective", "full")),
        ):
            if value not in allowed:
                raise ConfigError(f"training.{name}={value!r} is unknown; use one of {', '.join(allowed)}")
        if self.precision == "fp8" and self.cluster.gpu.fp8_tflops is None:
            raise ConfigError(f"training.precision=fp8: {self.cluster.gpu_name} has no FP8 unit; use bf16")
        for name in ("tensor", "pipeline", "context", "virtual"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"parallel.{FIXED[name]}={value} must be at least 1")
        if self.images_per_sample < 0:
            raise ConfigError(f"--images-per-sample {self.images_per_sample} must be at least 0")
        self._check_config()
        sequence = self.sequence_length
        for task, count in self.supervised_tokens.items():
            if not 0 < count <= sequence:
                raise ConfigError(
                    f"{count} supervised tokens of a {task.value} sample must lie between 1 and the sequence "
                    f"length {sequence}; set --supervised-tokens"
                )

    def _check_config(self) -> None:
        """What every layout would be refused for."""
        if self.config.engine.name != "megatron":
            raise ConfigError(f"engine.name={self.config.engine.name} is not planned for; set engine.name=megatron")
        if self.config.data.packing != "none":
            raise ConfigError(
                f"data.packing={self.config.data.packing} is not planned for: set data.packing=none, and "
                "model.max_seq_length to the length of a packed row"
            )
        validate(self.config_of(ParallelConfig()), 1, check_paths=False)

    @property
    def stage(self) -> Stage:
        """The row of the stage table."""
        return resolve_stage(self.config.training)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks that the stage trains."""
        return self.stage.tasks

    @property
    def shape(self) -> BackboneShape:
        """Sizes of the backbone."""
        return read_backbone(self.config.model.hf_config)

    @property
    def sequence_length(self) -> int:
        """Tokens per sample."""
        return self.config.model.max_seq_length

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation element."""
        return BYTES[self.precision]

    @property
    def uses_local_layers(self) -> bool:
        """megatron.core's layers; on a GPU `auto` means Transformer Engine's."""
        return self.config.model.transformer_impl == LOCAL

    @property
    def peak_tflops(self) -> float:
        """Dense peak of the base model's GEMMs, TFLOP/s; fp32 runs as TF32, half of bf16 on every GPU of the table."""
        gpu = self.cluster.gpu
        if self.precision == "fp8" and gpu.fp8_tflops is not None:
            return gpu.fp8_tflops
        return gpu.bf16_tflops / (2 if self.precision == "fp32" else 1)

    def config_of(self, parallel: ParallelConfig) -> RunConfig:
        """The run configuration of one layout, as a training run would have it."""
        training = dataclasses.replace(
            self.config.training,
            precision=self.precision,
            recompute=None if self.recompute == "none" else self.recompute,
            num_steps=1,
            num_epochs=None,
        )
        # Fields of TransformerConfig are checked where models are built: that needs the layers of this machine.
        model = dataclasses.replace(self.config.model, transformer_overrides={})
        return dataclasses.replace(self.config, model=model, parallel=parallel, training=training)

    def buildable_config_of(self, parallel: ParallelConfig) -> RunConfig:
        """As `config_of`, for a machine without a GPU: local layers (as many parameters), no weight folders."""
        config = self.config_of(parallel)
        vision = dataclasses.replace(config.model.vision, tower=None)
        config.model = dataclasses.replace(self.config.model, backbone=None, vision=vision, transformer_impl=LOCAL)
        config.training.precision = "bf16" if self.precision == "fp8" else self.precision
        return config


def default_supervised_tokens(config: RunConfig) -> dict[Task, int]:
    """Generation: all indices of one image with its two marks and the end token. Comprehension: answers of 256."""
    sequence = config.model.max_seq_length
    counts = {Task.COMPREHENSION: 256, Task.GENERATION: config.model.vq.indices + 3}
    return {task: min(counts[task], sequence) for task in TASKS}


def fixed_sizes(parallel: ParallelConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The fields of a request that overrides fix; sizes that no override names are left to the search.

    Args:
        parallel: the section with the overrides in it.
        overrides: ``key=value`` as the user gave them.

    Raises:
        ConfigError: the section as a whole; or sequence parallelism, which is on wherever the tensor size is above 1.
    """
    named = {item.partition("=")[0].strip().removeprefix("parallel.") for item in overrides}
    if "parallel" in named:
        raise ConfigError("parallel={…}: name the sizes that are fixed one by one, as parallel.context_parallel_size=2")
    if "sequence_parallel" in named:
        raise ConfigError("parallel.sequence_parallel is not searched: plans have it on at every tensor size above 1")
    sizes = {ours: getattr(parallel, option) for ours, option in FIXED.items() if option in named}
    return {ours: size for ours, size in sizes.items() if size is not None}
