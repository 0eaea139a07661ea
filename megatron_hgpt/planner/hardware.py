"""GPUs and clusters that a plan can be made for.

Figures are the vendor's data sheets: dense (not sparse) peaks of the SXM boards, bandwidths per GPU and direction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_hgpt.errors import ConfigError, did_you_mean

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links."""

    memory_gib: float
    """Device memory that a process can allocate from, GiB (less than the name says)."""
    bf16_tflops: float
    """Dense bf16 peak, TFLOP/s."""
    fp8_tflops: float | None
    """Dense FP8 peak, TFLOP/s; None where there is no FP8 unit."""
    hbm_gb_s: float
    """Device memory bandwidth, GB/s."""
    nvlink_gb_s: float
    """To the other GPUs of the node, GB/s in each direction."""
    network_gb_s: float
    """To other nodes, GB/s in each direction: one 200 Gb/s (A100) or 400 Gb/s adapter per GPU."""


GPUS: Mapping[str, Gpu] = {
    "a100-40": Gpu(
        memory_gib=39.4, bf16_tflops=312.0, fp8_tflops=None, hbm_gb_s=1555.0, nvlink_gb_s=300.0, network_gb_s=25.0
    ),
    "a100-80": Gpu(
        memory_gib=79.1, bf16_tflops=312.0, fp8_tflops=None, hbm_gb_s=2039.0, nvlink_gb_s=300.0, network_gb_s=25.0
    ),
    "h100": Gpu(
        memory_gib=79.1, bf16_tflops=989.5, fp8_tflops=1979.0, hbm_gb_s=3350.0, nvlink_gb_s=450.0, network_gb_s=50.0
    ),
    "h200": Gpu(
        memory_gib=139.8, bf16_tflops=989.5, fp8_tflops=1979.0, hbm_gb_s=4800.0, nvlink_gb_s=450.0, network_gb_s=50.0
    ),
    "b200": Gpu(
        memory_gib=178.3, bf16_tflops=2250.0, fp8_tflops=4500.0, hbm_gb_s=7700.0, nvlink_gb_s=900.0, network_gb_s=50.0
    ),
}


def gpu_named(name: str, overrides: Mapping[str, float | None]) -> Gpu:
    """A GPU of the table with some of its figures replaced.

    Args:
        name: key of `GPUS`.
        overrides: field of `Gpu` -> value; None keeps the table's.

    Raises:
        ConfigError: an unknown name (the nearest is suggested), or a figure that is not a positive number.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name!r} is unknown; there are {', '.join(GPUS)}{did_you_mean(name.lower(), GPUS)}")
    given = {field: value for field, value in overrides.items() if value is not None}
    for field, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{field.replace('_', '-')} {value} must be a positive number")
    return dataclasses.replace(GPUS[name], **given)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    gpu_name: str
    gpu: Gpu
    num_gpus: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        for name in ("num_gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise ConfigError(
                f"--num-gpus {self.num_gpus} is not a multiple of --gpus-per-node {self.gpus_per_node}; "
                "plan for whole nodes"
            )

    @property
    def node_size(self) -> int:
        """GPUs that share a node in this cluster."""
        return min(self.num_gpus, self.gpus_per_node)

    def bandwidth(self, span: int) -> float:
        """Bytes per second, per GPU and direction, in a group of ranks that lie within `span` neighbouring ranks."""
        return (self.gpu.nvlink_gb_s if span <= self.node_size else self.gpu.network_gb_s) * 1e9
