"""The processes of a run on this machine: how many, where they meet those of other machines, and how they end."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hgpt.batching import replica_size
from megatron_hgpt.config import ParallelConfig, RunConfig
from megatron_hgpt.environment import Nodes, name_launcher, share_cores
from megatron_hgpt.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    from megatron_hgpt.cli.supervisor import Agent, Patience

logger = logging.getLogger(__name__)

_TORCHRUN_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")
"""They report every process that ends, in many lines; here one says it."""
_LINGER_S = 10.0
"""Seconds that the first node of several stays after a failure that ends the run, to tell the others."""


def processes_per_node(parallel: ParallelConfig, nodes: Nodes) -> int:
    """What the user set, else as many replicas of the model as there are GPUs for, or on a CPU one.

    Raises:
        ConfigError: fewer GPUs than one replica needs.
    """
    if nodes.processes_per_node is not None:
        return nodes.processes_per_node
    import torch

    replica, gpus = replica_size(parallel), torch.cuda.device_count()
    if gpus == 0 or replica < 1:  # validation refuses the latter, in its own words
        return max(replica, 1)
    if gpus < replica:
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        product = " x ".join(f"parallel.{n}={getattr(parallel, n)}" for n in names if getattr(parallel, n) > 1)
        raise ConfigError(
            f"{product} needs {replica} GPUs, this machine has {gpus}; lower it (and set "
            "parallel.sequence_parallel=false at tensor size 1), or set NPROC_PER_NODE and NNODES for several machines"
        )
    return gpus // replica * replica


def meeting_point(nodes: Nodes, start_s: float) -> RendezvousParameters:
    """Where and how the launchers of all nodes meet, at the start and after each failure.

    Args:
        nodes: of the run.
        start_s: seconds that the nodes wait for each other.

    Raises:
        ConfigError: several nodes, and this one does not know which it is or where the first is.
    """
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    if nodes.num_nodes == 1:
        return RendezvousParameters("c10d", "localhost:0", "hgpt", 1, 1, local_addr="127.0.0.1", is_host=True)
    if nodes.node_rank is None or nodes.master_addr is None:
        raise ConfigError(f"NNODES={nodes.num_nodes}: set NODE_RANK and MASTER_ADDR on every node as well")
    return RendezvousParameters(
        "c10d",
        f"{nodes.master_addr}:{nodes.master_port}",
        "hgpt",
        nodes.min_nodes,
        nodes.num_nodes,
        local_addr=_address_towards(nodes.master_addr, nodes.master_port),
        is_host=nodes.node_rank == 0,
        join_timeout=round(start_s),
    )


def _address_towards(host: str, port: int) -> str:
    """This machine's own address on the way to another: its name may stand for an interface that others do not reach.

    Raises:
        ConfigError: there is no such host.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR={host}: {error.strerror}; name the first node as this one knows it") from error


def run_processes(processes: int, nodes: Nodes, command: Sequence[str], config: RunConfig) -> int:
    """Start ``hgpt <command>`` in every process of this machine, and again after failures that this may help.

    Args:
        processes: of this machine.
        nodes: of the run.
        command: words behind ``hgpt``.
        config: the run's: `launch`, `timeouts.start_s`, and where its checkpoints are.

    Returns:
        Exit status as in `exit_status`: the first failed process's, or 128 + the signal that stopped the run.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from megatron_hgpt.cli.supervisor import Patience

    meeting = meeting_point(nodes, config.timeouts.start_s)
    patience = Patience(config.launch, Path(config.checkpoint.directory or Path(config.output_dir) / "checkpoints"))
    share_cores(processes)
    name_launcher()
    if not config.checkpoint.resume:
        # This process has seen that the folder is new. What it starts again finds the run's own checkpoints.
        command = [*command, "checkpoint.resume=true"]
    try:
        return _supervise(processes, nodes, command, meeting, patience, config)
    except SignalException as stopped:  # while no process runs: between two starts, or before the first node answers
        logger.warning("stopped by signal %d between two starts; start again to resume", stopped.sigval)
        return _stopped_status(stopped.sigval)


def _supervise(
    processes: int,
    nodes: Nodes,
    command: Sequence[str],
    meeting: RendezvousParameters,
    patience: Patience,
    config: RunConfig,
) -> int:
    """One agent after the other, until one brings the run to its end; returns the exit status."""
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    while True:
        try:
            with _torchruns_lines_left_out(), tempfile.TemporaryDirectory(prefix="hgpt_") as folder:
                if nodes.num_nodes > 1 and nodes.node_rank != 0:
                    _await_first_node(nodes, config.timeouts.start_s)
                return _run_agent(_agent(processes, command, meeting, patience, config, Path(folder)))
        except (RendezvousError, DistError) as error:
            what = f"the first node, MASTER_ADDR={nodes.master_addr}, or too many others do not answer"
            if not patience.wait(f"{what} ({type(error).__name__})"):
                return 1


def _agent(
    processes: int,
    command: Sequence[str],
    meeting: RendezvousParameters,
    patience: Patience,
    config: RunConfig,
    folder: Path,
) -> Agent:
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    from megatron_hgpt.cli.supervisor import Agent

    spec = WorkerSpec(
        role="default",
        local_world_size=processes,
        entrypoint=sys.executable,
        args=("-u", "-m", "megatron_hgpt", *command),
        rdzv_handler=get_rendezvous_handler(meeting),
        max_restarts=sys.maxsize,  # the agent asks `patience`
        monitor_interval=0.1,
        local_addr=meeting.local_addr,
    )
    return Agent(
        spec,
        DefaultLogsSpecs(log_dir=str(folder)),
        patience=patience,
        grace_s=config.launch.grace_s,
        is_elastic=meeting.min_nodes < meeting.max_nodes,
    )


def _run_agent(agent: Agent) -> int:
    """Let it work until all is done or over; returns the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError

    group = agent.get_worker_group()
    try:
        result = agent.run()
    except SignalException as ended:
        if unsaved := agent.unsaved():
            said = ", ".join(f"{rank} (exit status {status})" for rank, status in sorted(unsaved.items()))
            logger.error("stopped by signal %d, but local ranks did not save: %s", ended.sigval, said)
            return 1
        finished = set(agent.exit_statuses().values()) == {0}
        return 0 if finished else _stopped_status(ended.sigval)
    except RendezvousClosedError:
        logger.error("another node has ended the run, and says why")
        return _shell_status(agent.hear_status())
    has_failed = result is None or result.is_failed()
    agent.tell_others(agent.last_status if has_failed else 0)
    group.spec.rdzv_handler.shutdown()
    if not has_failed:
        return 0
    if (group.group_world_size or 1) > 1:
        with contextlib.suppress(SignalException):  # the status is known
            time.sleep(_LINGER_S)  # the store in which the others read it may be this process's
    return _shell_status(agent.last_status)


def _stopped_status(signum: int) -> int:
    """Of a launcher that this signal stopped: a closed terminal (SIGHUP) is a SIGTERM to the processes, and here."""
    return 128 + int(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)


def _shell_status(status: int) -> int:
    """As a shell says it: 128 + the signal for a process that one ended."""
    return 128 - status if status < 0 else status


def _await_first_node(nodes: Nodes, limit_s: float) -> None:
    """Wait until the first node's launcher listens; what comes later says what is wrong if it never does."""
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError), socket.create_connection((nodes.master_addr, nodes.master_port), timeout=5):
            return
        time.sleep(1)


@contextlib.contextmanager
def _torchruns_lines_left_out() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _TORCHRUN_LOGGERS]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
