"""What torchrun tells its processes, and what a user may tell the launcher, read without importing torch."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_hgpt.errors import ConfigError


def world_size_from_environment() -> int:
    """Number of processes torchrun started; 1 without torchrun.

    Raises:
        ConfigError: WORLD_SIZE is no such number.
    """
    return _count("WORLD_SIZE") or 1


def rank_from_environment() -> int:
    """Global rank of this process; 0 without torchrun.

    Raises:
        ConfigError: RANK is no such number.
    """
    return _count("RANK", at_least=0) or 0


def started_by_torchrun() -> bool:
    """Whether this process is one of a group that a launcher started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def started_by_an_elastic_launcher() -> bool:
    """Whether a torchrun (or ft_launcher, which is one) started this process and watches it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def name_launcher() -> None:
    """Tell the processes that this one starts its pid."""
    os.environ["HGPT_LAUNCHER_PID"] = str(os.getpid())


def launcher_from_environment() -> int | None:
    """Pid of the ``hgpt train`` that started this process; None where another launcher did."""
    return _count("HGPT_LAUNCHER_PID", at_most=2**22)


def started_by_ft_launcher() -> bool:
    """Whether ft_launcher of nvidia-resiliency-ext started this process and waits for its heartbeats."""
    return "FT_RANK_MONITOR_IPC_SOCKET" in os.environ


def restart_count_from_environment() -> str:
    """How often torchrun itself has started this run's processes again; 0 without torchrun."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def is_started_again() -> bool:
    """Whether torchrun or Slurm started this run before, by the same command."""
    counts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.isdecimal() and int(count) > 0 for count in counts)


def write_error_file(message: str) -> None:
    """Leave the message that torchrun repeats at the end of its report on this process; nothing without torchrun."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")


def error_messages_of_this_machine() -> list[str]:
    """What the processes of this machine have left by `write_error_file`; nothing without torchrun."""
    messages = []
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        for file in Path(path).parent.parent.glob(f"*/{Path(path).name}"):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                messages.append(str(json.loads(file.read_text(encoding="utf-8"))["message"]["message"]))
    return messages


def environment_with(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with variables added or replaced, for a child process."""
    return {**os.environ, **variables}


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The machines of a run that hgpt starts itself, from NNODES, NODE_RANK, MASTER_ADDR, …"""

    num_nodes: int = 1
    """At most."""
    min_nodes: int = 1
    """With fewer than `num_nodes` but these the run goes on (NNODES=MIN:MAX)."""
    node_rank: int | None = None
    master_addr: str | None = None
    """Of the first node; both are needed where there are several."""
    master_port: int = 29500
    processes_per_node: int | None = None
    """None leaves it to the layout and the GPUs of this machine."""


def nodes_from_environment() -> Nodes:
    """NPROC_PER_NODE, NNODES (N or MIN:MAX), and for several nodes NODE_RANK, MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: a number that is none.
    """
    min_nodes, num_nodes = _nodes_range()
    if num_nodes == 1:  # the others mean nothing then, and an earlier run in this process may have left them
        return Nodes(processes_per_node=_count("NPROC_PER_NODE"))
    return Nodes(
        num_nodes=num_nodes,
        min_nodes=min_nodes,
        node_rank=_count("NODE_RANK", at_least=0),
        master_addr=os.environ.get("MASTER_ADDR") or None,
        master_port=_count("MASTER_PORT", at_most=65_535) or 29500,
        processes_per_node=_count("NPROC_PER_NODE"),
    )


_MOST = 2**20
"""Processes or nodes of a run: above any cluster, and below what would start processes until the machine gives up."""


def _nodes_range() -> tuple[int, int]:
    text = os.environ.get("NNODES") or "1"
    least, separator, most = text.partition(":")
    if not separator:
        number = _count("NNODES") or 1
        return number, number
    is_range = all(part.isascii() and part.isdecimal() and len(part) < 10 for part in (least, most))
    if not (is_range and 1 <= int(least) <= int(most) <= _MOST):
        raise ConfigError(f"NNODES={text[:40]!r} must be a whole number from 1 to {_MOST}, or MIN:MAX of two such")
    return int(least), int(most)


def _count(name: str, at_least: int = 1, at_most: int = _MOST) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and at_least <= int(text) <= at_most):
        raise ConfigError(f"{name}={text[:40]!r} must be a whole number from {at_least} to {at_most}")
    return int(text)


def share_cores(processes: int) -> None:
    """Give every process of this machine its share of the cores, unless the user set OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, -(-cores // processes))))


def use_one_hardware_queue() -> None:
    """What megatron.core asks for, unless the user decided: else kernels overtake the communication that they overlap.

    It counts before CUDA is initialised, and does nothing without a GPU.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
