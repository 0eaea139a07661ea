"""What a real (small) model keeps, measured on the CPU and held against the planner's formulas.

Activations are compared in fp32 (the CPU's RMSNorm keeps an fp32 copy of a bf16 input, the GPU's does not) and with
Megatron's unfused SwiGLU, which is what runs on a CPU. Parameters, gradients and optimizer state have to agree exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_hgpt import cpu_platform
from megatron_hgpt.backbone.implementation import LOCAL
from megatron_hgpt.config import RunConfig
from megatron_hgpt.parameters import group_of
from megatron_hgpt.planner.activations import ActivationModel
from megatron_hgpt.planner.hardware import GPUS, Cluster
from megatron_hgpt.planner.layouts import Layout
from megatron_hgpt.planner.memory import rank_memory
from megatron_hgpt.planner.meta_model import RankModel, build_rank_models, build_stage
from megatron_hgpt.planner.request import PlanRequest
from megatron_hgpt.samples import IGNORE_INDEX, MicroBatch, Task

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One predicted figure beside the measured one, bytes on this rank."""

    name: str
    predicted: int
    measured: int

    @property
    def deviation(self) -> float:
        """(predicted - measured) / measured; zero where both are nothing."""
        return (self.predicted - self.measured) / self.measured if self.measured else float(self.predicted > 0)


def saved_bytes(model: torch.nn.Module, batch: MicroBatch) -> int:
    """Bytes of all distinct storages that autograd saves in one forward pass of `batch`, parameters left out.

    A view counts with the whole storage that it keeps alive, as an allocator would count it. Runs backward too.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # the graph holds it, so no other storage can get this address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(batch)
    kept = sum(storages.values())  # before backward: recomputation packs again
    losses.sum().backward()
    return kept


def _tensors_of(state: object) -> Iterable[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors_of(value)


def optimizer_state_bytes(optimizer: MegatronOptimizer) -> int:
    """Bytes of Adam's moments and of the fp32 master copies of Megatron's optimizer, after a step of every group."""
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        total += sum(tensor.nbytes for state in part.optimizer.state.values() for tensor in _tensors_of(state))
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            groups = getattr(part, name, [])
            total += sum(tensor.nbytes for group in groups for tensor in group if tensor is not None)
    return total


def synthetic_batch(request: PlanRequest, task: Task) -> MicroBatch:
    """A micro-batch of the request's shape: images first, supervised positions last, tokens without meaning."""
    micro, length = request.config.training.micro_batch_size, request.sequence_length
    vision = request.config.model.vision.hf_config
    num_slots = request.images_per_sample * request.config.model.vision.num_image_tokens
    image_mask = torch.zeros(micro, length, dtype=torch.bool)
    image_mask[:, :num_slots] = True
    labels = torch.full((micro, length), IGNORE_INDEX)
    labels[:, length - request.supervised_tokens[task] :] = 1
    return MicroBatch(
        task=task,
        tokens=torch.zeros(micro, length, dtype=torch.long),
        labels=labels,
        position_ids=torch.arange(length).expand(micro, length),
        image_mask=image_mask,
        pixel_values=torch.zeros(micro * request.images_per_sample, 3, vision["image_size"], vision["image_size"]),
        sample_ids=[str(i) for i in range(micro)],
        num_supervised_tokens=micro * request.supervised_tokens[task],
        num_content_tokens=micro * length,
    )


def compare(request: PlanRequest, layout: Layout, rank_model: RankModel) -> list[Comparison]:
    """Build the model of this process's rank for real and measure it; one pipeline stage only.

    Args:
        request: small enough to run here.
        layout: the layout that parallel state was initialised with; one pipeline stage.
        rank_model: what the plan expects on this rank.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_hgpt.optim import build_optimizer

    config = request.buildable_config_of(layout.parallel_config(distributed_optimizer=request.distributed_optimizer))
    (model,) = build_stage(config, torch.device("cpu"))
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(group_of(name) in request.stage.parameter_groups)
            parameter.fill_(0.01)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=request.distributed_optimizer,
    )
    ddp = DistributedDataParallel(model.config, settings, model)
    optimizer = build_optimizer(config, request.stage, [ddp])
    predicted = rank_memory(request, layout, rank_model)
    results = []
    for task in request.tasks:
        sizes = ActivationModel(request=request, layout=layout, task=task, fused_swiglu=False)
        measured = saved_bytes(model, synthetic_batch(request, task))
        results.append(Comparison(name=f"activations {task.value}", predicted=sizes.chunk_bytes(0), measured=measured))
    ddp.finish_grad_sync()
    optimizer.step()
    parameters = [(parameter.requires_grad, parameter.nbytes) for parameter in model.parameters()]
    exact = {
        "frozen parameters": (predicted.frozen, sum(size for trained, size in parameters if not trained)),
        "trained parameters": (predicted.trained, sum(size for trained, size in parameters if trained)),
        "gradients": (predicted.gradients, sum(buffer.grad_data.nbytes for buffer in ddp.buffers)),
        "optimizer state": (predicted.optimizer, optimizer_state_bytes(optimizer)),
    }
    results += [Comparison(name=name, predicted=pair[0], measured=pair[1]) for name, pair in exact.items()]
    return results


def small_request(config: RunConfig, num_gpus: int = 1, **changes: Any) -> PlanRequest:
    """A request for `config` in fp32 on as many processes as there are `num_gpus`."""
    training = dataclasses.replace(config.training, precision=changes.get("precision", "fp32"))
    model = dataclasses.replace(config.model, backbone=None, transformer_impl=LOCAL)
    config = dataclasses.replace(config, training=training, model=model)
    defaults: dict[str, Any] = {
        "precision": "fp32",
        "supervised_tokens": dict.fromkeys(Task, config.model.max_seq_length // 4),
    }
    cluster = Cluster(gpu_name="h100", gpu=GPUS["h100"], num_gpus=num_gpus, gpus_per_node=8)
    return PlanRequest(config=config, cluster=cluster, **{**defaults, **changes})


def compare_in_group(cases: Sequence[tuple[PlanRequest, Layout]]) -> list[list[Comparison]]:
    """`compare` each case on every process of a group that torchrun (or a test) starts; all are of the group's size."""
    from megatron_hgpt import distributed

    cpu_platform.install_if_needed()
    from megatron.core import parallel_state

    # All predictions first: they need a process without a group.
    predicted = [build_rank_models(request, layout)[0] for request, layout in cases]
    results = []
    try:
        for (request, layout), rank_model in zip(cases, predicted, strict=True):
            parallel = layout.parallel_config(distributed_optimizer=request.distributed_optimizer)
            distributed.initialize(parallel, seed=1)
            results.append(compare(request, layout, rank_model))
            parallel_state.destroy_model_parallel()
    finally:
        distributed.shutdown()
    return results


def check_here() -> dict[str, list[Comparison]]:
    """The tiny preset in this process, by kind of recomputation."""
    from megatron_hgpt.config_io import load_config

    overrides = ["training.stage=stage3_joint", "training.global_batch_size=2", "training.micro_batch_size=2"]
    cases = {}
    for recompute in ("none", "selective", "full"):
        request = small_request(load_config(preset="tiny", overrides=overrides), recompute=recompute)
        layers = (request.shape.num_layers,)
        cases[recompute] = request, Layout(tensor=1, pipeline=1, context=1, data=1, layers_per_stage=layers)
    return dict(zip(cases, compare_in_group(list(cases.values())), strict=True))
