"""Model FLOP/s by the 4N rule, and the share of the device's peak where that peak is known.

A trained parameter costs 6 FLOPs per token: 2 forward, 2 for the gradient of its input, 2 for its own. A frozen
parameter that gradients pass through costs 4, since its own gradient is never formed. Attention scores and the frozen
vision tower (forward only, once per image) are left out, so the figure is a lower bound of the work done.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from megatron_hgpt.hooks.base import Hook, StepRecord, TrainState

logger = logging.getLogger(__name__)

PEAK_BF16_FLOPS_PER_S: tuple[tuple[str, float], ...] = (
    ("H200 NVL", 835.5e12),
    ("H200", 989.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100 NVL", 835.5e12),
    ("H100", 989.5e12),
    ("A100", 312e12),
)
"""Part of `torch.cuda.get_device_name` -> dense bf16 peak of NVIDIA's data sheets; the first match counts."""


@dataclass(frozen=True, kw_only=True)
class PathParameters:
    """Parameters that a token passes through, over the whole model (not one rank's shard)."""

    num_frozen: int
    num_trained: int

    @property
    def flops_per_token(self) -> int:
        """4 x frozen + 6 x trained."""
        return 4 * self.num_frozen + 6 * self.num_trained


def peak_bf16_flops_per_s(device_name: str) -> float | None:
    """Dense bf16 peak of one device, None where it is not in the table."""
    return next((peak for name, peak in PEAK_BF16_FLOPS_PER_S if name in device_name), None)


class ThroughputHook(Hook):
    """Logs model FLOP/s at the end of the stage.

    Args:
        parameters: what the rule multiplies.
        world_size: ranks of the job, one device each.
        device_name: for the peak; None reads the current CUDA device.
        num_warmup_steps: first steps of this process that are not counted (allocation, kernel selection).
    """

    def __init__(
        self,
        *,
        parameters: PathParameters,
        world_size: int = 1,
        device_name: str | None = None,
        num_warmup_steps: int = 2,
    ) -> None:
        self.parameters = parameters
        self.world_size = world_size
        self.device_name = device_name
        self.num_warmup_steps = num_warmup_steps
        self._num_steps = 0
        self._num_tokens = 0
        self._time_s = 0.0

    @property
    def model_flops_per_s(self) -> float | None:
        """Over all devices, since the warm-up; None before a step was counted."""
        return self.parameters.flops_per_token * self._num_tokens / self._time_s if self._time_s else None

    def on_step_end(self, state: TrainState, record: StepRecord) -> None:
        """Add one step."""
        self._num_steps += 1
        if self._num_steps > self.num_warmup_steps:
            self._num_tokens += record.num_tokens
            self._time_s += record.step_time_s

    def on_fit_end(self, state: TrainState) -> None:
        """Log the rule, the rate and, for bf16 on a known device, the share of the peak."""
        rate = self.model_flops_per_s
        if rate is None or not state.is_writer:
            return
        name = self.device_name or (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
        peak = peak_bf16_flops_per_s(name) if state.config.training.precision == "bf16" else None
        share = f", {rate / (peak * self.world_size):.1%} of {peak / 1e12:.0f} TFLOP/s (bf16, dense)" if peak else ""
        logger.info(
            "4N rule (4 x %d frozen + 6 x %d trained parameters per token): %.4g model TFLOP/s on %d x %s%s",
            self.parameters.num_frozen,
            self.parameters.num_trained,
            rate / 1e12,
            self.world_size,
            name,
            share,
        )
