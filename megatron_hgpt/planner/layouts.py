"""Which layouts of a cluster are legal for a model, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_hgpt.config import ParallelConfig, RunConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.model.backbone import check_tensor_parallel
from megatron_hgpt.planner.request import PlanRequest
from megatron_hgpt.validation import validate

_MIN_TOKENS_PER_CONTEXT_RANK = 1024
"""Below it ring attention has too little work to hide its exchange; only an explicit --context goes lower."""


@dataclass(frozen=True, kw_only=True, order=True)
class Layout:
    """tensor x pipeline x context x data ranks; sequence parallel wherever tensor > 1."""

    tensor: int
    pipeline: int
    context: int
    data: int
    layers_per_stage: tuple[int, ...]
    virtual: int = 1
    """Model chunks per pipeline stage (interleaved 1F1B)."""

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def name(self) -> str:
        """Short and unique."""
        chunks = f"x{self.virtual}" if self.virtual > 1 else ""
        return f"TP{self.tensor} PP{self.pipeline}{chunks} CP{self.context} DP{self.data}"

    def parallel_config(self, *, distributed_optimizer: bool) -> ParallelConfig:
        """The section of a run configuration."""
        layers = self.layers_per_stage
        uneven = len(set(layers)) > 1
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor,
            sequence_parallel=self.tensor > 1,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual if self.virtual > 1 else None,
            num_layers_in_first_pipeline_stage=layers[0] if uneven else None,
            num_layers_in_last_pipeline_stage=layers[-1] if uneven and self.pipeline > 2 else None,
            context_parallel_size=self.context,
            use_distributed_optimizer=distributed_optimizer,
        )

    def run_config(self, request: PlanRequest) -> RunConfig:
        """The run configuration of this layout."""
        return request.config_of(self.parallel_config(distributed_optimizer=request.distributed_optimizer))


def split_layers(num_layers: int, num_stages: int) -> tuple[int, ...] | None:
    """Layers per pipeline stage: even, or with shorter first and last stages, which also hold tower and head.

    None where the middle stages cannot be equal without an end that is longer than they, or empty.
    """
    if num_layers % num_stages == 0:
        return (num_layers // num_stages,) * num_stages
    longest = -(-num_layers // num_stages)
    ends = num_layers - longest * (num_stages - 2)
    if num_stages == 1 or ends < 2:
        return None
    return (ends // 2, *[longest] * (num_stages - 2), ends - ends // 2)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _layout(request: PlanRequest, tensor: int, pipeline: int, context: int) -> Layout:
    """One layout.

    Raises:
        ConfigError: it is illegal here: the reason.
    """
    cluster, shape = request.cluster, request.shape
    check_tensor_parallel(shape, tensor)
    if cluster.node_size % tensor:
        raise ConfigError(f"tensor {tensor} does not divide the {cluster.node_size} GPUs of a node")
    if pipeline > shape.num_layers:
        raise ConfigError(f"pipeline {pipeline} exceeds the {shape.num_layers} layers of the backbone")
    if cluster.num_gpus % (tensor * pipeline * context):
        raise ConfigError(
            f"tensor {tensor} x pipeline {pipeline} x context {context} does not divide {cluster.num_gpus} GPUs"
        )
    layers = split_layers(shape.num_layers, pipeline)
    if layers is None:
        raise ConfigError(
            f"{shape.num_layers} layers do not split over {pipeline} pipeline stages without a longer or empty end"
        )
    # Causal context parallelism cuts a sequence into 2 chunks per rank; sequence parallelism cuts those by T.
    pieces = tensor * (2 * context if context > 1 else 1)
    if request.sequence_length % pieces:
        raise ConfigError(
            f"sequence length {request.sequence_length} does not divide into {pieces} pieces (tensor, context)"
        )
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        data=cluster.num_gpus // (tensor * pipeline * context),
        layers_per_stage=layers,
        virtual=request.virtual if pipeline > 1 else 1,
    )
    validate(layout.run_config(request), layout.world_size, check_paths=False)  # what the trainer would refuse
    return layout


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


def legal_layouts(request: PlanRequest) -> tuple[list[Layout], dict[str, int]]:
    """All layouts that the trainer runs, and the reasons of the refused ones with how many layouts each refuses.

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
