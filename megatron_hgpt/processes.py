"""``python -m megatron_hgpt.processes <arguments of a run>``: processes to start on this node, for the launcher."""

from __future__ import annotations

import sys

from megatron_hgpt.cli import parse_args
from megatron_hgpt.errors import ConfigError, HealthGPTError


def processes_per_node(argv: list[str]) -> int:
    """As many replicas of the model as there are GPUs for, or on a CPU one.

    Raises:
        ConfigError: what `cli.parse_args` refuses, or fewer GPUs than one replica needs.
    """
    import torch

    config, _ = parse_args(argv)
    tensor, gpus = config.parallel.tensor_model_parallel_size, torch.cuda.device_count()
    if gpus == 0 or tensor < 1:  # validation refuses the latter, in its own words
        return max(tensor, 1)
    if gpus < tensor:
        raise ConfigError(
            f"parallel.tensor_model_parallel_size={tensor} needs {tensor} GPUs, this machine has {gpus}; lower it (and "
            "set parallel.sequence_parallel=false at 1), or set NPROC_PER_NODE and NNODES for several machines"
        )
    return gpus // tensor * tensor


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{processes_per_node(sys.argv[1:])}\n")
    except HealthGPTError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)
