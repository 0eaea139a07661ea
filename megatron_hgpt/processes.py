"""``python -m megatron_hgpt.processes <arguments of a run>``: processes to start on this node, for the launcher."""

from __future__ import annotations

import sys

from megatron_hgpt.cli import parse_args
from megatron_hgpt.errors import HealthGPTError


def processes_per_node(argv: list[str]) -> int:
    """Every GPU, or on a CPU one replica of the model."""
    import torch

    config, _ = parse_args(argv)
    return torch.cuda.device_count() or config.parallel.tensor_model_parallel_size


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{processes_per_node(sys.argv[1:])}\n")
    except HealthGPTError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)
