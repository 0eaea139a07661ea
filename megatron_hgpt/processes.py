"""``python -m megatron_hgpt.processes <arguments of a run>``: processes to start on this node, for the launcher."""

from __future__ import annotations

import sys

from megatron_hgpt.batching import replica_size
from megatron_hgpt.cli import parse_args
from megatron_hgpt.errors import ConfigError, HealthGPTError


def processes_per_node(argv: list[str]) -> int:
    """As many replicas of the model as there are GPUs for, or on a CPU one.

    Raises:
        ConfigError: what `cli.parse_args` refuses, or fewer GPUs than one replica needs.
    """
    import torch

    config, _ = parse_args(argv)
    parallel, gpus = config.parallel, torch.cuda.device_count()
    replica = replica_size(parallel)
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


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{processes_per_node(sys.argv[1:])}\n")
    except HealthGPTError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)
