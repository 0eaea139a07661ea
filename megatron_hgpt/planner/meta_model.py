"""The real model of one rank on torch's meta device, under a fake process group of the layout's full size.

Counts and dtypes come from the modules that a run would build, not from formulas: what the model's code changes, the
plan follows. `build_stage` is the one place that knows how a pipeline stage is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_hgpt import cpu_platform
from megatron_hgpt.config import RunConfig
from megatron_hgpt.errors import HealthGPTError
from megatron_hgpt.parameters import group_of
from megatron_hgpt.planner.layouts import Layout
from megatron_hgpt.planner.request import PlanRequest
from megatron_hgpt.stages import Stage, resolve_stage

if TYPE_CHECKING:
    from megatron_hgpt.model.healthgpt import HealthGPT

_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters of one kind on one rank."""

    name: str
    """A group of `megatron_hgpt.stages`, with backbone split into base_linears and norms, vocabulary into its two."""
    is_trained: bool
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """What a tensor-parallel rank of one pipeline stage holds (all ranks of a stage hold as much)."""

    pipeline_rank: int
    num_layers: int
    groups: tuple[ParameterGroup, ...]
    trained_numels: tuple[tuple[int, ...], ...]
    """Elements of every trained parameter per model chunk, in module order: it fixes the gradient buffer's padding."""
    tensor_reduced_numel: int
    """Elements of trained parameters whose gradients are summed over the tensor-parallel ranks (sequence parallel)."""

    def _chosen(self, names: tuple[str, ...], trained: bool | None) -> Iterator[ParameterGroup]:
        for group in self.groups:
            if (not names or group.name in names) and trained in (None, group.is_trained):
                yield group

    def count(self, *names: str, trained: bool | None = None) -> int:
        """Parameters of some groups (all without names)."""
        return sum(group.num_parameters for group in self._chosen(names, trained))

    def bytes(self, *names: str, trained: bool | None = None) -> int:
        """Bytes of some groups (all without names), as built."""
        return sum(group.num_bytes for group in self._chosen(names, trained))


@contextlib.contextmanager
def fake_process_group(world_size: int, rank: int) -> Iterator[None]:
    """A process group in which this process is `rank` of `world_size` ranks that do not exist.

    Raises:
        HealthGPTError: the process has a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise HealthGPTError("the planner needs a process of its own: here a process group is open; close it first")
    # torch puts the rank before every traceback of the process, once more with each group and beyond its end.
    hook = sys.excepthook
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        sys.excepthook = hook


@contextlib.contextmanager
def fake_layout(layout: Layout, pipeline_rank: int) -> Iterator[None]:
    """Megatron's real parallel state of `layout` for the first rank of a pipeline stage."""
    cpu_platform.install_if_needed()
    from megatron.core import parallel_state

    # Megatron numbers ranks tensor fastest, then context, data, pipeline.
    rank = pipeline_rank * (layout.world_size // layout.pipeline)
    with fake_process_group(layout.world_size, rank):
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tensor,
                pipeline_model_parallel_size=layout.pipeline,
                virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
                context_parallel_size=layout.context,
                create_gloo_process_groups=False,
            )
            yield
        finally:
            parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def _everything_on_meta() -> Iterator[None]:
    """Megatron asks for the current CUDA device by name: answer meta, as torch's device context does elsewhere."""
    real = torch.cuda.current_device
    torch.cuda.current_device = lambda: _META  # type: ignore[assignment,return-value]
    try:
        with _META:
            yield
    finally:
        torch.cuda.current_device = real  # type: ignore[assignment]


def build_stage(config: RunConfig, device: torch.device = _META) -> list[HealthGPT]:
    """The model chunks of this process's pipeline stage, their weights undefined.

    Args:
        config: the run's configuration, its parallel section as parallel state was initialised.
        device: where they are built; on meta they have shapes only.
    """
    cpu_platform.install_if_needed()
    from megatron_hgpt.build import bare_model_chunks

    with _everything_on_meta() if device == _META else contextlib.nullcontext():
        return bare_model_chunks(
            config,
            device,
            dropout=dict(resolve_stage(config.training).dropout),
            with_tower=config.data.feature_cache is None,
        )


def _kind_of(name: str) -> str:
    group = group_of(name)
    if group == "vocabulary":
        return "embedding" if "word_embeddings" in name else "head"
    if group == "backbone":
        return "base_linears" if ".linear_" in name else "norms"
    return group


def describe_stage(chunks: Sequence[HealthGPT], stage: Stage, *, pipeline_rank: int) -> RankModel:
    """Count the parameters of a stage by kind, and which of them `stage` trains."""
    totals: dict[tuple[str, bool], list[int]] = {}
    numels: list[tuple[int, ...]] = []
    reduced = 0
    for chunk in chunks:
        trained_here = []
        for name, parameter in chunk.named_parameters():
            trained = group_of(name) in stage.parameter_groups
            entry = totals.setdefault((_kind_of(name), trained), [0, 0])
            entry[0] += parameter.numel()
            entry[1] += parameter.nbytes
            if trained:
                trained_here.append(parameter.numel())
                reduced += parameter.numel() if getattr(parameter, "sequence_parallel", False) else 0
        numels.append(tuple(trained_here))
    return RankModel(
        pipeline_rank=pipeline_rank,
        num_layers=sum(len(chunk.language_model.decoder.layers) for chunk in chunks),
        groups=tuple(
            ParameterGroup(name=name, is_trained=trained, num_parameters=count, num_bytes=size)
            for (name, trained), (count, size) in totals.items()
        ),
        trained_numels=tuple(numels),
        tensor_reduced_numel=reduced,
    )


def build_rank_models(request: PlanRequest, layout: Layout) -> list[RankModel]:
    """One entry per pipeline rank of `layout`; ranks that hold the same are built once.

    Raises:
        ConfigError: the model refuses the layout.
        HealthGPTError: the process has a process group already, or Megatron splits the layers otherwise.
    """
    config = request.buildable_config_of(layout.parallel_config(distributed_optimizer=request.distributed_optimizer))
    built: dict[tuple[bool, bool, int], RankModel] = {}
    models = []
    for rank, num_layers in enumerate(layout.layers_per_stage):
        key = (rank == 0, rank == layout.pipeline - 1, num_layers)
        if key not in built:
            with fake_layout(layout, rank):
                built[key] = describe_stage(build_stage(config), request.stage, pipeline_rank=rank)
            if built[key].num_layers != num_layers:
                raise HealthGPTError(
                    f"{layout.name}: Megatron put {built[key].num_layers} layers on pipeline rank {rank}, the plan "
                    f"{num_layers}"
                )
        models.append(dataclasses.replace(built[key], pipeline_rank=rank))
    return models
