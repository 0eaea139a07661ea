"""What is saved, as megatron.core's sharded tensors and objects: weights, optimizer state, random states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_hgpt.engines.base import OptimizerState
from megatron_hgpt.parameters import chunk_prefix, group_of, named_parameters

if TYPE_CHECKING:
    from megatron_hgpt.model.healthgpt import HealthGPT


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def model_state(models: Sequence[HealthGPT], groups: Sequence[str]) -> dict[str, Any]:
    """Sharded tensors of the named groups by this rank's parameter names.

    Inside the checkpoint the layers of all pipeline stages are one tensor, so that any layout finds its part.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    metadata = _metadata()
    result = {}
    for i, model in enumerate(models):
        state = model.language_model.sharded_state_dict(prefix="language_model.", metadata=metadata)
        state.update(
            make_sharded_tensors_for_checkpoint(
                model.adapters.state_dict(prefix="", keep_vars=True),
                "adapters.",
                {},
                (),
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                dp_cp_group=metadata["dp_cp_group"],
            )
        )
        wanted = (name for name in state if group_of(name) in groups and "_extra_state" not in name)
        result.update({chunk_prefix(models, i) + name: state[name] for name in wanted})
    return result


def optimizer_tensors(state: OptimizerState, model_state: dict[str, Any]) -> dict[str, Any]:
    """Sharded tensors ``<slot>.<parameter name>`` of the optimizer's state."""
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    return {
        f"{slot}.{name}": make_sharded_optimizer_tensor(model_state[name], tensor, f"optimizer.{slot}")
        for name, slots in state.gather().items()
        for slot, tensor in slots.items()
    }


def steps_per_group(state: OptimizerState) -> dict[str, int]:
    """Optimizer steps of each parameter group, over all pipeline stages; every rank must call it."""
    mine: dict[str, int] = {}
    for group in state.groups:
        mine[group["group"]] = max(mine.get(group["group"], 0), int(group.get("step", 0)))
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    # Megatron gives every rank every group; where a stage holds none of its parameters, it never steps.
    return {name: max(one.get(name, 0) for one in every) for name in {name for one in every for name in one}}


def by_parameter(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """``<slot>.<parameter name>`` -> parameter name -> slot."""
    result: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        slot, name = key.split(".", 1)
        result.setdefault(name, {})[slot] = tensor
    return result


def rng_object() -> Any:
    """This rank's random states, one object per (pipeline, tensor, data and context) rank."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    states = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    offset = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject("rng", states, shape, offset, replica_id=0)


@torch.no_grad()
def copy_tensors(models: Sequence[HealthGPT], loaded: dict[str, torch.Tensor]) -> None:
    """Put loaded tensors into the parameters of their names, where they are not loaded in place already."""
    parameters = named_parameters(models)
    for name, value in loaded.items():
        if value is not parameters[name] and value.data_ptr() != parameters[name].data_ptr():
            parameters[name].copy_(value)
