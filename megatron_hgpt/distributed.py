"""Process groups, device and seeds; with `environment` the only modules that read torchrun's environment."""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from megatron_hgpt import cpu_platform
from megatron_hgpt.config import ParallelConfig
from megatron_hgpt.environment import (
    rank_from_environment,
    restart_count_from_environment,
    world_size_from_environment,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """Where this process stands in the layout; sizes and ranks are counts of processes."""

    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def is_writer(self) -> bool:
        """True on exactly one process: the one that logs and writes metrics."""
        return self.rank == 0


def initialize(parallel: ParallelConfig, seed: int, timeout_s: float = 1800.0) -> DistributedContext:
    """Start the process group, Megatron's model-parallel groups and the random states.

    Args:
        parallel: sizes of the layout; already validated against the world size.
        seed: seeds the default generator alike on every model-parallel rank and the tensor-parallel one apart.
        timeout_s: seconds after which a collective that not every rank joined raises.
    """
    on_cpu = cpu_platform.install_if_needed()
    from megatron.core import parallel_state

    rank, world_size = rank_from_environment(), world_size_from_environment()
    if on_cpu:
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500" if world_size > 1 else "0")
        torch.distributed.init_process_group(
            "gloo" if on_cpu else "nccl",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            create_gloo_process_groups=not on_cpu,
            distributed_timeout_minutes=timeout_s / 60,  # its groups have their own; a fraction is fine with it
        )
    context = DistributedContext(
        device=device,
        rank=rank,
        world_size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
    )
    seed_everything(context, seed)
    return context


def store_of_its_own() -> torch.distributed.Store:
    """A connection to the process group's store for a thread: on a shared one it would wait for the main thread.

    What an earlier start of the same launcher wrote is not in it.
    """
    shared: Any = torch.distributed.distributed_c10d._get_default_store()
    return torch.distributed.PrefixStore(f"start {restart_count_from_environment()}", shared.clone())


def seed_everything(context: DistributedContext, seed: int) -> None:
    """Start the random states that dropout draws from.

    Masks differ between data-parallel ranks, context-parallel ranks and pipeline stages. Tensor-parallel ranks share
    the default generator and differ in Megatron's tracked model-parallel one.
    """
    _seed_rank(seed, context.dp_rank * context.cp_size + context.cp_rank, context.pp_rank)


def seed_from_step(seed: int, step: int) -> None:
    """`seed_everything` for a run that goes on after `step` without its random states: masks it has not drawn yet."""
    from megatron.core import parallel_state

    drawn = int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:4], "big")
    _seed_rank(
        drawn,
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_rank(),
    )


def _seed_rank(seed: int, dp_cp_rank: int, pp_rank: int) -> None:
    from megatron.core import tensor_parallel

    rank_seed = seed + 10_000 * dp_cp_rank + 100 * pp_rank
    torch.manual_seed(rank_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(rank_seed, force_reset_rng=True)


def shutdown() -> None:
    """Destroy Megatron's groups and the process group; safe to call twice."""
    if not torch.distributed.is_initialized():
        return
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
