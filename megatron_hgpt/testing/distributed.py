"""Run a function on several real processes that talk over gloo, and collect what each returns."""

from __future__ import annotations

import os
import queue
import socket
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from multiprocessing.queues import Queue


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _context(fresh: bool) -> SpawnContext | ForkServerContext:
    """How ranks start: forked from a server that has the imports done; spawned where a fork is unsafe or unwanted."""
    if fresh or torch.cuda.is_available():  # CUDA does not survive a fork
        return torch.multiprocessing.get_context("spawn")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_hgpt.testing.preloaded"])
    return context


def _entry(
    rank: int,
    world_size: int,
    port: int,
    results: Queue[tuple[int, bool, Any]],
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()  # a forked process begins with the environment of the server's start
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        from megatron_hgpt import distributed

        # A rank that failed leaves its peers waiting inside a collective, so nobody may wait for them here.
        distributed.shutdown()


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0, fresh: bool = False
) -> list[Any]:
    """Call ``function(*args)`` in `world_size` new processes with torchrun's environment.

    Args:
        function: importable (module level); its result must pickle (move tensors out as numpy or CPU clones).
        world_size: processes.
        args: passed to every rank.
        timeout_s: seconds until the run counts as hung.
        fresh: processes in which megatron.core is not imported yet.

    Returns:
        The ranks' results in rank order.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died or did not finish in time.
    """
    context = _context(fresh)
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_entry, args=(rank, world_size, port, results, dict(os.environ), function, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    outcome: dict[int, Any] = {}
    try:
        waited = 0.0
        while len(outcome) < world_size:
            try:
                rank, succeeded, value = results.get(timeout=1.0)
            except queue.Empty:
                waited += 1.0
                dead = [r for r, p in enumerate(processes) if r not in outcome and p.exitcode not in (None, 0)]
                if dead:
                    raise AssertionError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}") from None
                if waited > timeout_s:
                    raise AssertionError(
                        f"ranks {set(range(world_size)) - set(outcome)} hung > {timeout_s} s"
                    ) from None
                continue
            if not succeeded:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
            outcome[rank] = value
    finally:
        for process in processes:
            process.join(timeout=0.1 if len(outcome) < world_size else 20.0)
            if process.is_alive():
                process.kill()
    return [outcome[rank] for rank in range(world_size)]
