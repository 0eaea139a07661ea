"""Which layouts of a cluster are legal for a model, and why the others are not.

The trainer's own `validation.validate` decides; this module adds only the limits that come from the cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_hgpt.backbone.implementation import sequence_multiple
from megatron_hgpt.batching import num_micro_batches
from megatron_hgpt.config import ParallelConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.planner.request import PlanRequest
from megatron_hgpt.rounding import round_up
from megatron_hgpt.validation import validate

_MIN_TOKENS_PER_CONTEXT_RANK = 1024
"""Below it attention has too little work to hide the exchange of keys; only a fixed context size goes lower."""


@dataclass(frozen=True, kw_only=True, order=True)
class Layout:
    """tensor x pipeline x context x data ranks; sequence parallel wherever tensor > 1."""

    tensor: int
    pipeline: int
    context: int
    data: int
    layers_per_stage: tuple[int, ...]
    """Between the first and the last stage all have the same number."""
    virtual: int = 1
    """Model chunks per pipeline stage (interleaved 1F1B)."""

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def name(self) -> str:
        """A short name that tells it from all others, e.g. for a chart."""
        interleaved = f" VP{self.virtual}" if self.virtual > 1 else ""
        return f"TP{self.tensor} PP{self.pipeline}{interleaved} CP{self.context} DP{self.data}"

    def parallel_config(self, *, distributed_optimizer: bool) -> ParallelConfig:
        """The section of a run configuration."""
        layers = self.layers_per_stage
        middle = layers[1] if self.pipeline > 2 else layers[-1]
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor,
            sequence_parallel=self.tensor > 1,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual if self.virtual > 1 else None,
            num_layers_in_first_pipeline_stage=None if layers[0] == middle else layers[0],
            num_layers_in_last_pipeline_stage=None if layers[-1] == middle else layers[-1],
            context_parallel_size=self.context,
            use_distributed_optimizer=distributed_optimizer,
        )

    def padded_length(self, request: PlanRequest) -> int:
        """Tokens of a sample after the trainer's padding to equal shares."""
        config = request.config_of(self.parallel_config(distributed_optimizer=request.distributed_optimizer))
        multiple = sequence_multiple(config.parallel, config.training)
        return round_up(request.sequence_length, multiple)

    def num_micro_batches(self, request: PlanRequest) -> int:
        """Micro-batches per rank and optimizer step."""
        return num_micro_batches(request.config, self.data)


def split_layers(num_layers: int, pipeline: int, first: int | None = None, last: int | None = None) -> tuple[int, ...]:
    """Layers per pipeline stage, as equal as Megatron's split allows: only the two ends may differ from the others.

    Among equals the ends are short: the first stage also holds tower and embedding, the last the head.

    Args:
        num_layers: of the backbone, at least `pipeline`.
        pipeline: stages.
        first, last: layers of the ends where they are given; the others then share the rest.

    Returns:
        One number per stage, not checked: what does not add up is `validate`'s to refuse.
    """
    if first is None and last is None and num_layers % pipeline:
        inner = max(pipeline - 2, 0)
        splits = []
        for middle in range(1, num_layers // inner + 1 if inner else 2):
            ends = num_layers - middle * inner
            if ends >= 2:
                splits.append((ends // 2, *[middle] * inner, ends - ends // 2))
        return min(splits, key=lambda layers: (max(layers), layers[0] + layers[-1]))
    free = pipeline - (first is not None) - (last is not None)
    middle = (num_layers - (first or 0) - (last or 0)) // max(free, 1)
    layers = [middle] * pipeline
    layers[0] = middle if first is None else first
    layers[-1] = layers[-1] if last is None else last
    return tuple(layers)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _candidates(request: PlanRequest) -> Iterator[tuple[int, int, int]]:
    cluster = request.cluster
    contexts = [
        size
        for size in _divisors(cluster.node_size)
        if size == 1 or request.sequence_length // size >= _MIN_TOKENS_PER_CONTEXT_RANK
    ]
    stages = [size for size in _divisors(cluster.num_gpus) if size <= request.shape.num_layers]
    for tensor in [request.tensor] if request.tensor else _divisors(cluster.node_size):
        for pipeline in [request.pipeline] if request.pipeline else stages:
            for context in [request.context] if request.context else contexts:
                yield tensor, pipeline, context


def _layout(request: PlanRequest, tensor: int, pipeline: int, context: int) -> Layout:
    """The layout of these sizes.

    Raises:
        ConfigError: it is illegal, and why.
    """
    cluster, num_layers = request.cluster, request.shape.num_layers
    if pipeline > num_layers:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size={pipeline} exceeds the {num_layers} layers of the backbone"
        )
    if cluster.num_gpus % (tensor * pipeline * context):
        raise ConfigError(
            f"tensor {tensor} x pipeline {pipeline} x context {context} does not divide {cluster.num_gpus} GPUs"
        )
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        data=cluster.num_gpus // (tensor * pipeline * context),
        layers_per_stage=split_layers(num_layers, pipeline, request.first_layers, request.last_layers),
        virtual=request.virtual,
    )
    parallel = layout.parallel_config(distributed_optimizer=request.distributed_optimizer)
    validate(request.config_of(parallel), layout.world_size, check_paths=False)
    if sum(layout.layers_per_stage) != num_layers:
        raise ConfigError(
            f"parallel.num_layers_in_first_pipeline_stage={request.first_layers} and "
            f"num_layers_in_last_pipeline_stage={request.last_layers} do not leave equal stages of the {num_layers} "
            f"layers at pipeline_model_parallel_size={pipeline}"
        )
    if cluster.node_size % tensor:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size={tensor} does not divide the {cluster.node_size} GPUs of a node"
        )
    return layout


def legal_layouts(request: PlanRequest) -> tuple[list[Layout], dict[str, int]]:
    """All legal layouts, and the reasons of the refused ones with how many layouts each refuses.

    Raises:
        ConfigError: there is no legal layout; names the reasons.
    """
    layouts: list[Layout] = []
    refused: dict[str, int] = {}
    for tensor, pipeline, context in _candidates(request):
        try:
            layouts.append(_layout(request, tensor, pipeline, context))
        except ConfigError as error:
            refused[str(error)] = refused.get(str(error), 0) + 1
    if not layouts:
        reasons = "; ".join(sorted(refused, key=lambda reason: -refused[reason])[:3])
        raise ConfigError(f"no layout of {request.cluster.num_gpus} GPUs is legal: {reasons}")
    return layouts, refused
