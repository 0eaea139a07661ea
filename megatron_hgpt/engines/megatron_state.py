"""AdamW's state of each trained parameter as whole tensors: one form for every engine of Megatron's optimizer.

Megatron keeps the moments beside the parameter (fp32), beside an fp32 copy of it (bf16), or as flat slices spread over
the data-parallel ranks (distributed optimizer). A checkpoint holds none of these but whole tensors by parameter name,
so that any layout resumes any other's. Sizes are those of the trained parameters, a few percent of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_hgpt.engines.base import MAIN, MOMENTS
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

    @torch.no_grad()
    def gather(self) -> dict[str, dict[str, torch.Tensor]]:
        """Parameter name -> exp_avg, exp_avg_sq, and main of a bf16 parameter; shaped like the parameter.

        With the distributed optimizer every data-parallel rank must call it.
        """
        return {
            name: {slot: self._whole(p, slot) for slot in (*MOMENTS, *([MAIN] if p.dtype != torch.float32 else []))}
            for name, p in self._trained.items()
        }

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Copy whole tensors into what this rank holds of them."""
        for name, parameter in self._trained.items():
            held = self._held(parameter)
            for slot, source in whole[name].items() if held else ():
                if self._is_distributed:
                    source = source.reshape(-1)[self._range(parameter)]
                held[slot].copy_(source.view_as(held[slot]))

    def _whole(self, parameter: torch.nn.Parameter, slot: str) -> torch.Tensor:
        held = self._held(parameter)
        if not self._is_distributed:
            return held[slot]
        from megatron.core import parallel_state

        flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if held:
            flat[self._range(parameter)] = held[slot].view(-1).to(flat.device)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(flat, group=group)
        return flat.view_as(parameter)

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

    def _range(self, parameter: torch.nn.Parameter) -> slice:
        assert self._inner is not None
        span = self._inner._get_model_param_range_map(parameter)["param"]
        return slice(span.start, span.end)
