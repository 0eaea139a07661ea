"""Which layouts of a cluster are legal for a model, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_hgpt.config import ParallelConfig, RunConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.model.backbone import BackboneShape, check_tensor_parallel
from megatron_hgpt.model.vocabulary import Vocabulary
from megatron_hgpt.planner.request import PlanRequest
from megatron_hgpt.validation import global_batch_size

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

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def name(self) -> str:
        """Short and unique."""
        return f"TP{self.tensor} PP{self.pipeline} CP{self.context} DP{self.data}"

    @property
    def is_even(self) -> bool:
        """Every pipeline stage has the same number of layers."""
        return len(set(self.layers_per_stage)) == 1

    def parallel_config(self, *, distributed_optimizer: bool) -> ParallelConfig:
        """The section of a run configuration."""
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor,
            sequence_parallel=self.tensor > 1,
            pipeline_model_parallel_size=self.pipeline,
            context_parallel_size=self.context,
            use_distributed_optimizer=distributed_optimizer,
        )

    def transformer_overrides(self) -> dict[str, object]:
        """Megatron's layer layout where the layers do not divide evenly; empty otherwise."""
        if self.is_even:
            return {}
        stages = ["t" * count for count in self.layers_per_stage]
        stages[0], stages[-1] = "E" + stages[0], stages[-1] + "L"
        return {"pipeline_model_parallel_layout": "|".join(stages)}

    def run_config(self, request: PlanRequest) -> RunConfig:
        """The run configuration of this layout."""
        return request.config_of(
            self.parallel_config(distributed_optimizer=request.distributed_optimizer), self.transformer_overrides()
        )


def split_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers per pipeline stage, as equal as possible.

    The longer stages lie in the middle: the first also holds tower and embedding, the last the head.
    """
    short, num_long = divmod(num_layers, num_stages)
    first = (num_stages - num_long + 1) // 2
    return tuple(short + (first <= stage < first + num_long) for stage in range(num_stages))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _problem(request: PlanRequest, shape: BackboneShape, tensor: int, pipeline: int, context: int) -> str | None:
    """Why tensor x pipeline x context is illegal here, or None."""
    cluster, config = request.cluster, request.config
    try:
        check_tensor_parallel(shape, tensor)
    except ConfigError as error:
        return str(error)
    if cluster.node_size % tensor:
        return f"tensor {tensor} does not divide the {cluster.node_size} GPUs of a node"
    rows = Vocabulary.from_config(config.model).padded_size
    if rows % tensor:
        return f"{rows} padded vocabulary rows do not divide by tensor {tensor}; raise model.vocabulary.pad_to_multiple"
    if pipeline > shape.num_layers:
        return f"pipeline {pipeline} exceeds the {shape.num_layers} layers of the backbone"
    if cluster.num_gpus % (tensor * pipeline * context):
        return f"tensor {tensor} x pipeline {pipeline} x context {context} does not divide {cluster.num_gpus} GPUs"
    # Causal context parallelism cuts a sequence into 2 chunks per rank; sequence parallelism cuts those by T.
    pieces = tensor * (2 * context if context > 1 else 1)
    if request.sequence_length % pieces:
        return f"sequence length {request.sequence_length} does not divide into {pieces} pieces (tensor, context)"
    data = cluster.num_gpus // (tensor * pipeline * context)
    micro, total = config.training.micro_batch_size, global_batch_size(config)
    if micro < 1 or total < 1 or total % (micro * data):
        return (
            f"global batch {total} is not a multiple of micro batch {micro} x data {data}; "
            "raise --global-batch-size or the model-parallel sizes"
        )
    return None


def _candidates(request: PlanRequest, shape: BackboneShape) -> Iterator[tuple[int, int, int]]:
    cluster = request.cluster
    contexts = [
        size
        for size in _divisors(cluster.node_size)
        if size == 1 or request.sequence_length // size >= _MIN_TOKENS_PER_CONTEXT_RANK
    ]
    stages = [size for size in _divisors(cluster.num_gpus) if size <= shape.num_layers]
    for tensor in [request.tensor] if request.tensor else _divisors(cluster.node_size):
        for pipeline in [request.pipeline] if request.pipeline else stages:
            for context in [request.context] if request.context else contexts:
                yield tensor, pipeline, context


def legal_layouts(request: PlanRequest) -> tuple[list[Layout], dict[str, int]]:
    """All legal layouts, and the reasons of the refused ones with how many layouts each refuses.

    Raises:
        ConfigError: there is no legal layout; names the reasons.
    """
    shape = request.shape
    layouts: list[Layout] = []
    refused: dict[str, int] = {}
    for tensor, pipeline, context in _candidates(request, shape):
        if reason := _problem(request, shape, tensor, pipeline, context):
            refused[reason] = refused.get(reason, 0) + 1
            continue
        data = request.cluster.num_gpus // (tensor * pipeline * context)
        layers = split_layers(shape.num_layers, pipeline)
        layouts.append(Layout(tensor=tensor, pipeline=pipeline, context=context, data=data, layers_per_stage=layers))
    if not layouts:
        reasons = "; ".join(sorted(refused, key=lambda reason: -refused[reason])[:3])
        raise ConfigError(f"no layout of {request.cluster.num_gpus} GPUs is legal: {reasons}")
    return layouts, refused


def trainer_problem(request: PlanRequest, layout: Layout) -> str | None:
    """Why the trainer of this version refuses a layout that Megatron could run, or None."""
    from megatron_hgpt.validation import validate

    problem: Any = None
    if request.precision == "fp8":
        return "training.precision knows bf16 and fp32, not fp8"
    try:
        validate(layout.run_config(request), layout.world_size, check_paths=False)
    except ConfigError as error:
        problem = str(error)
    return problem
