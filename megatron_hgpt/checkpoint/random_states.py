"""Random states in a checkpoint: gone on with at the same layout, drawn anew from seed and step at another one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_hgpt.checkpoint.metadata_file import Contents
from megatron_hgpt.checkpoint.reading import read_object, read_whole
from megatron_hgpt.checkpoint.state import Chunk
from megatron_hgpt.distributed import seed_from_step
from megatron_hgpt.errors import CheckpointError

logger = logging.getLogger(__name__)

RNG = "rng"
TRACKER = "tracker/"
"""Before the name of a state of Megatron's tracker."""


def restore_random_states(folder: Path, info: dict[str, Any], contents: Contents, seed: int) -> None:
    """Go on with the random states of this rank's place in the layout, or begin others that the run has not had.

    Raises:
        CheckpointError: the states are missing or damaged.
    """
    sizes, place = layout()
    if sizes != info["rng_layout"]:
        before, now = _named(info["rng_layout"]), _named(sizes)
        logger.warning("%s was saved at %s and goes on at %s: dropout draws anew", folder, before, now)
        seed_from_step(seed, info["step"])
        return
    numbers = ".".join(map(str, place))
    present = _kinds(present_states())
    if info["format_version"] < 3:
        states = _states_of_an_object(folder, contents, f"{RNG}/shard_{numbers}_{'.'.join(map(str, sizes))}")
        kinds = _kinds(states)
    else:
        prefix = f"{RNG}/{numbers}/"
        stored = {key.removeprefix(prefix): one for key, one in contents.tensors.items() if key.startswith(prefix)}
        kinds = {name: (one.properties.dtype, one.size) for name, one in stored.items()}
        # Only what has the size of the present ones is read: the map may name any.
        states = {name: read_whole(folder, contents, prefix + name) for name in stored} if kinds == present else {}
    if kinds != present:
        logger.warning("%s was saved on another kind of device: dropout draws anew", folder)
        seed_from_step(seed, info["step"])
        return
    _set(folder, states)


def _kinds(states: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Name -> what a state must share with the present one to take its place: CPU and GPU have others."""
    return {
        name: (state.dtype, state.shape) if isinstance(state, torch.Tensor) else (state,)
        for name, state in states.items()
    }


def rng_chunks() -> list[Chunk]:
    """This rank's random states as bytes: ``rng/<pipeline>.<tensor>.<data and context rank>/<name>``."""
    _, place = layout()
    prefix = f"{RNG}/{'.'.join(map(str, place))}"
    return [
        Chunk(key=f"{prefix}/{name}", global_shape=tuple(state.shape), offset=(0,) * state.ndim, tensor=state)
        for name, state in present_states().items()
    ]


def present_states() -> dict[str, torch.Tensor]:
    """This rank's, by name."""
    from megatron.core import tensor_parallel

    trackers = tensor_parallel.get_cuda_rng_tracker().get_states()
    states = {TRACKER + name: state for name, state in trackers.items()}
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(), **states}


def _set(folder: Path, states: dict[str, torch.Tensor]) -> None:
    from megatron.core import tensor_parallel

    trackers = {name.removeprefix(TRACKER): state for name, state in states.items() if name.startswith(TRACKER)}
    try:
        tensor_parallel.get_cuda_rng_tracker().set_states(trackers)
        torch.cuda.set_rng_state(states["cuda"])
        torch.set_rng_state(states["cpu"])
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: its random states are refused ({error}); use another checkpoint") from error


def _states_of_an_object(folder: Path, contents: Contents, key: str) -> dict[str, torch.Tensor]:
    """The one object that formats 1 and 2 kept per rank, in the names of format 3."""
    content = read_object(folder, contents, key)
    try:
        (states,) = content
        flat = {"cpu": states["cpu"], "cuda": states["cuda"]}
        flat.update({TRACKER + name: state for name, state in states["tracker"].items()})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {key} holds no random states; use another checkpoint") from error
    return flat


def layout() -> tuple[list[int], list[int]]:
    """Sizes of (pipeline, tensor, data and context), and this rank's place in each."""
    from megatron.core import parallel_state

    sizes = [
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    ]
    place = [
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    ]
    return sizes, place


def _named(sizes: Sequence[int]) -> str:
    """The sizes of `layout` in words."""
    pipeline, tensor, data = sizes
    return f"pipeline {pipeline} x tensor {tensor} x data and context {data}"
