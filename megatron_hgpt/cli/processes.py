"""The processes of a run on this machine: how many, and torchrun around them without its traceback for a mistake."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from megatron_hgpt.batching import replica_size
from megatron_hgpt.cli.frame import USER_ERROR
from megatron_hgpt.config import ParallelConfig
from megatron_hgpt.environment import Nodes, share_cores
from megatron_hgpt.errors import ConfigError

logger = logging.getLogger(__name__)

_TORCHRUN_LOGGER = "torch.distributed.elastic.multiprocessing.api"


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


def torchrun_arguments(processes: int, nodes: Nodes, command: Sequence[str]) -> list[str]:
    """torchrun's own arguments for this machine's share of the run, then ``hgpt``'s `command` for every process.

    Raises:
        ConfigError: several nodes, and this one does not know which it is or where the first is.
    """
    rendezvous = ["--standalone"]
    if nodes.num_nodes > 1:
        if nodes.node_rank is None or nodes.master_addr is None:
            raise ConfigError(f"NNODES={nodes.num_nodes}: set NODE_RANK and MASTER_ADDR on every node as well")
        rendezvous = ["--nnodes", str(nodes.num_nodes), "--node-rank", str(nodes.node_rank)]
        rendezvous += ["--master-addr", nodes.master_addr, "--master-port", str(nodes.master_port)]
    return [*rendezvous, "--nproc-per-node", str(processes), "-m", "megatron_hgpt", *command]


def run_processes(processes: int, nodes: Nodes, command: Sequence[str]) -> int:
    """Start ``hgpt <command>`` in every process of this machine under torchrun, which lives in this process.

    torchrun reports a child that ended with an error in some thirty lines and exits with 1. Where the child has said a
    user's mistake in its one line (exit status 2), that is left out and the status handed on.

    Returns:
        Exit status: the first failed child's, or 128 + the signal that ended this process.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = torchrun.parse_args(torchrun_arguments(processes, nodes, command))
    share_cores(processes)
    withheld = _Withheld()
    logging.getLogger(_TORCHRUN_LOGGER).addFilter(withheld)
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == USER_ERROR:
            return USER_ERROR
        withheld.release()
        raise
    except SignalException as ended:
        withheld.release()
        logger.error("stopped by signal %d; a run started again continues from its newest checkpoint", ended.sigval)
        return 128 + int(ended.sigval)
    finally:
        logging.getLogger(_TORCHRUN_LOGGER).removeFilter(withheld)
    return 0


class _Withheld(logging.Filter):
    """Keeps back what torchrun says about ending children until it is known why they ended."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self._records.append(record)
        return False

    def release(self) -> None:
        """Hand out the kept records."""
        target: Any = logging.getLogger(_TORCHRUN_LOGGER)
        target.removeFilter(self)
        for record in self._records:
            target.handle(record)
