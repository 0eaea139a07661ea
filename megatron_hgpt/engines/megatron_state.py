"""Where Megatron's optimizers keep AdamW's state of each trained parameter.

Megatron keeps the moments beside the parameter (fp32), beside an fp32 copy of it (bf16), or as flat slices spread over
the data-parallel ranks (distributed optimizer). A checkpoint says of each range to which tensor it belongs and where in
it, by parameter name, so that any layout resumes any other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_hgpt.engines.base import MAIN, MOMENTS, StatePart
from megatron_hgpt.errors import HealthGPTError


class MegatronOptimizerState:
    """`OptimizerState` of one rank's Megatron optimizer.

    Args:
        optimizer: what `optim.build_optimizer` returned.
        parameters: this rank's parameters by name; those without gradients are left out.
    """

    def __init__(self, optimizer: Any, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._trained = {name: p for name, p in parameters.items() if p.requires_grad}
        chained = getattr(optimizer, "chained_optimizers", [optimizer])
        inner = [one for one in chained if not getattr(one, "is_stub_optimizer", False)]
        if len(inner) > 1:
            raise HealthGPTError(f"{len(inner)} optimizers on one rank: expert parameters are not trained here")
        self._inner = inner[0] if inner else None  # a pipeline stage may train nothing
        self._is_distributed = hasattr(self._inner, "model_param_group_index_map")
        if self._inner is not None:
            init_state = getattr(self._inner.optimizer, "init_state", None)
            init_state() if init_state else self._inner.init_state_fn(self._inner.optimizer, self._inner.config)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups, which hold name and step count."""
        return [] if self._inner is None else self._inner.optimizer.param_groups

    @property
    def is_split(self) -> bool:
        """See `OptimizerState.is_split`."""
        return self._is_distributed

    @torch.no_grad()
    def parts(self) -> dict[str, dict[str, StatePart]]:
        """See `OptimizerState.parts`."""
        return {name: self._parts_of(p) for name, p in self._trained.items()}

    def restored(self) -> None:
        """See `OptimizerState.restored`: fp32 parameters are stepped in place, the copies of others were read."""

    def _parts_of(self, parameter: torch.nn.Parameter) -> dict[str, StatePart]:
        held = self._held(parameter)
        start = self._start(parameter) if held and self._is_distributed else 0
        slots = (*MOMENTS, *([MAIN] if parameter.dtype != torch.float32 else []))
        return {slot: StatePart(start=start, tensor=held[slot].view(-1)) for slot in slots if held}

    def _held(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Slot -> tensor of this rank; empty where other data-parallel ranks hold all of it."""
        assert self._inner is not None
        if self._is_distributed:
            place = self._inner.model_param_group_index_map.get(parameter)
            if place is None:
                return {}
            main = self.groups[place[0]]["params"][place[1]]
        else:
            main = getattr(parameter, "main_param", None)
            main = parameter if main is None else main
        state = self._inner.optimizer.state[main]
        return {**{slot: state[slot] for slot in MOMENTS}, MAIN: main.data}

    def _start(self, parameter: torch.nn.Parameter) -> int:
        assert self._inner is not None
        return int(self._inner._get_model_param_range_map(parameter)["param"].start)
