"""What a checkpoint holds, as rectangles of whole tensors: weights, optimizer state, random states.

Each rank names the rectangles that lie in its own memory. They are written from there and read into there: no tensor is
gathered, and any layout finds its part of what another one wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_hgpt.engines.base import OptimizerState
from megatron_hgpt.parameters import chunk_prefix, group_of, named_parameters

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_hgpt.model.healthgpt import HealthGPT


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A rectangle of a whole tensor, and where its values lie on this rank."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Of the rectangle in the whole tensor."""
    tensor: torch.Tensor
    """Of the rectangle's shape, with as many axes as the whole tensor; what is written into it counts."""
    is_first_copy: bool = True
    """False where a rank of another tensor-parallel or pipeline place, which holds the same, writes it."""
    is_shared: bool = False
    """Whether all data-parallel ranks of this place hold the same: one of them is enough to write it."""

    @property
    def num_bytes(self) -> int:
        """Of the values."""
        return self.tensor.numel() * self.tensor.element_size()


def model_state(models: Sequence[HealthGPT], groups: Sequence[str]) -> dict[str, ShardedTensor]:
    """Sharded tensors of the named groups by this rank's parameter names.

    Inside the checkpoint the layers of all pipeline stages are one tensor, so that any layout finds its part.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    result = {}
    for i, model in enumerate(models):
        state = model.language_model.sharded_state_dict(prefix="language_model.", metadata={"dp_cp_group": dp_cp_group})
        state.update(
            make_sharded_tensors_for_checkpoint(
                model.adapters.state_dict(prefix="", keep_vars=True),
                "adapters.",
                {},
                (),
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                dp_cp_group=dp_cp_group,
            )
        )
        wanted = (name for name in state if group_of(name) in groups and "_extra_state" not in name)
        result.update({chunk_prefix(models, i) + name: state[name] for name in wanted})
    return result


def model_chunks(tensors: Mapping[str, ShardedTensor]) -> list[Chunk]:
    """The weights that `model_state` found."""
    return [
        Chunk(
            key=tensor.key,
            global_shape=tuple(tensor.global_shape),
            offset=tuple(tensor.global_offset),
            tensor=_values(tensor)[(None,) * tensor.prepend_axis_num],
            is_first_copy=_is_first_copy(tensor),
            is_shared=True,
        )
        for tensor in tensors.values()
    ]


def optimizer_chunks(state: OptimizerState, tensors: Mapping[str, ShardedTensor]) -> list[Chunk]:
    """Each slot of the optimizer's state, shaped like its parameter in `tensors`: ``optimizer.<slot>.<key>``."""
    return [
        Chunk(
            key=f"optimizer.{slot}.{tensors[name].key}",
            global_shape=tuple(tensors[name].global_shape),
            offset=offset,
            tensor=values,
            is_first_copy=_is_first_copy(tensors[name]),
            is_shared=not state.is_split,
        )
        for name, slots in state.parts().items()
        for slot, part in slots.items()
        for offset, values in _placed(tensors[name], part.start, part.tensor)
    ]


def _values(tensor: ShardedTensor) -> torch.Tensor:
    assert tensor.data is not None
    return tensor.data.detach()


def _is_first_copy(tensor: ShardedTensor) -> bool:
    """megatron.core counts copies by (others, tensor rank, data rank)."""
    assert isinstance(tensor.replica_id, tuple)
    return not any(tensor.replica_id[:-1])


def _placed(whole: ShardedTensor, start: int, values: torch.Tensor) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """A range of the flattened local tensor as rectangles: offset in the whole tensor, and a view of the values."""
    axes = whole.prepend_axis_num
    for corner, shape in rectangles(whole.local_shape, start, start + values.numel()):
        count = math.prod(shape)
        offset = [a + b for a, b in zip(whole.global_offset, (*(0,) * axes, *corner), strict=True)]
        yield tuple(offset), values[:count].view(*(1,) * axes, *shape)
        values = values[count:]


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements `start` to `stop` of a tensor in row-major order, as (corner, shape) of at most 2 len(shape) - 1 boxes.

    The boxes come in the order of their elements, and each holds consecutive ones.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows in between
    if last < first:  # inside one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for corner, box in rectangles(shape[1:], start, stop):
        yield (row, *corner), (1, *box)


def optimizer_steps(state: OptimizerState) -> dict[str, int]:
    """Optimizer steps of each parameter group on this rank.

    megatron.core gives every rank every group; where a stage holds none of its parameters, it never steps: the steps of
    a group are the most that any rank says.
    """
    steps: dict[str, int] = {}
    for group in state.groups:
        steps[group["group"]] = max(steps.get(group["group"], 0), int(group.get("step", 0)))
    return steps


@torch.no_grad()
def copy_tensors(models: Sequence[HealthGPT], loaded: dict[str, torch.Tensor]) -> None:
    """Put loaded tensors into the parameters of their names, where they are not loaded in place already."""
    parameters = named_parameters(models)
    for name, value in loaded.items():
        if value is not parameters[name] and value.data_ptr() != parameters[name].data_ptr():
            parameters[name].copy_(value)
