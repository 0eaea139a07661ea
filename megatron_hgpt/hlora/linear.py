"""Megatron's parallel linears with H-LoRA plugins beside the frozen weight.

They subclass the base linears, so that base weights keep Megatron's names. The branch lives in mixins, which the local
linears here and Transformer Engine's (`te_linear`) share. Activations are [s, b, h]; T is the
tensor-parallel size; sequence parallelism (SP) shards s over T.

Column (QKV, FC1)   Every rank holds P whole and applies it to its own tokens of the norm's output. Only u, [s, b, r],
                    is gathered, never [s, b, h]; backward that is a reduce-scatter (SP) or an all-reduce.
Row (proj, FC2)     P is cut along its input, so z is a partial sum, which is reduced BEFORE the gate. Every rank holds
                    B whole and applies it to its own tokens.

Under SP the gradients of replicated factors (P of column, B of row) are sums over local tokens only: their
``sequence_parallel`` flag makes Megatron's finalize_model_grads add them up over T.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megatron_hgpt.config import HLoRAPluginConfig
from megatron_hgpt.hlora.plugins import BranchLayout, HLoRAPlugin
from megatron_hgpt.samples import Task

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict
    from megatron.core.transformer.transformer_config import TransformerConfig

Offsets = tuple[tuple[int, int, int], ...]
"""Of megatron.core's sharded tensors: (axis, this shard's place on it, shards on it)."""

ActivePlugin = tuple[HLoRAPlugin, torch.Tensor | None]
"""A plugin to run, and the tokens (bool [s], this rank's) it works on; None is all."""


class HLoRALinearMixin(nn.Module):
    """Plugins of one linear and the choice among them; goes in front of the base class.

    `HLoRATransformerLayer` sets `active_task` and `token_tasks`.

    Args:
        input_size, output_size: full (unsharded) features; `kwargs` go to the base class.
        hlora_plugins: plugins by task.
        hlora_layout: how the branch is cut.
    """

    splits_input: ClassVar[bool]
    """Whether tensor parallelism cuts the linear's input (row: P is sharded) or its output (column: B is)."""

    hlora: nn.ModuleDict
    active_task: Task | None
    token_tasks: torch.Tensor | None
    sequence_parallel: bool
    tp_group: torch.distributed.ProcessGroup
    config: TransformerConfig
    weight: nn.Parameter

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        hlora_plugins: Mapping[Task, HLoRAPluginConfig],
        hlora_layout: BranchLayout,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.active_task, self.token_tasks = None, None
        self.hlora = nn.ModuleDict()
        tp_size = self.tp_group.size()
        for task, config in hlora_plugins.items():
            plugin = HLoRAPlugin(
                config,
                hlora_layout,
                input_size=input_size // tp_size if self.splits_input else input_size,
                output_divisor=1 if self.splits_input else tp_size,
                dtype=self.config.params_dtype,
                device=self.weight.device,
            )
            self._mark_parameters(plugin)
            self.hlora[task.value] = plugin

    def _mark_parameters(self, plugin: HLoRAPlugin) -> None:
        """Tell Megatron which factor is sharded and which one every rank holds whole."""
        replicated = "lora_b" if self.splits_input else "lora_p"
        for name, parameter in plugin.named_parameters():
            if name.startswith(replicated):
                parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
            else:
                set_tensor_model_parallel_attributes(parameter, True, 0 if name.startswith("lora_b") else 1, 1)

    def _active_plugins(self) -> list[ActivePlugin]:
        if self.token_tasks is None:
            tasks = [] if self.active_task is None else [self.active_task]
            return [(cast(HLoRAPlugin, self.hlora[task]), None) for task in tasks if task in self.hlora]
        mine = self.token_tasks
        if self.sequence_parallel:
            mine = mine.chunk(self.tp_group.size())[self.tp_group.rank()]
        return [(cast(HLoRAPlugin, self.hlora[task]), mine == task.code) for task in Task if task in self.hlora]

    def _rng_context(self) -> contextlib.AbstractContextManager[None]:
        # Under SP the ranks hold different tokens, and each draws its own mask. Without it all ranks hold the same
        # tokens and must draw the same mask.
        return get_cuda_rng_tracker().fork() if self.sequence_parallel else contextlib.nullcontext()

    def _sharded_state_dict(
        self, axes: dict[str, int], prefix: str, offsets: Offsets, metadata: dict[str, Any] | None
    ) -> ShardedStateDict:
        for name, parameter in self.hlora.named_parameters():
            if getattr(parameter, "tensor_model_parallel", False):
                axes[f"hlora.{name}"] = parameter.partition_dim  # type: ignore[attr-defined]
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _split(joined: torch.Tensor, widths: list[int]) -> Sequence[torch.Tensor]:
    return [joined] if len(widths) == 1 else joined.split(widths, dim=-1)


class HLoRAColumnMixin(HLoRALinearMixin):
    """The branch of a column-parallel linear (QKV, FC1)."""

    splits_input = False

    def gathered_u(self, active: Sequence[ActivePlugin], input_: torch.Tensor) -> torch.Tensor:
        """u of all tokens, [s, b, sections, r], from the local ones of the linear's input, [s/T or s, b, in].

        Two plugins stand side by side on the rank axis, so that one gather serves both.
        """
        u = _join([plugin.gate(plugin.project(input_), self._rng_context, tokens) for plugin, tokens in active])
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(u, group=self.tp_group)  # backward: reduce-scatter
        return copy_to_tensor_model_parallel_region(u, group=self.tp_group)  # backward: all-reduce

    def add_branches(self, output: torch.Tensor, active: Sequence[ActivePlugin], u: torch.Tensor) -> torch.Tensor:
        """The base linear's output plus what every plugin makes of its share of `gathered_u`: [s, b, out/T]."""
        for (plugin, _), part in zip(active, _split(u, [p.config.lora_rank for p, _ in active]), strict=True):
            output = output + plugin.expand(part, self.tp_group.size())
        return output

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s/T or s, b, in] to [s, b, out/T]."""
        active = self._active_plugins()
        if not active:
            return super().forward(input_, *args, **kwargs)
        u = self.gathered_u(active, input_)
        output, bias = super().forward(input_, *args, **kwargs)
        return self.add_branches(output, active, u), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Base weight and bias sharded on axis 0, P replicated, B on axis 0."""
        return self._sharded_state_dict({"weight": 0, "bias": 0}, prefix, sharded_offsets, metadata)


class HLoRARowMixin(HLoRALinearMixin):
    """The branch of a row-parallel linear (attention projection, FC2)."""

    splits_input = True

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, in/T] to [s/T or s, b, out]."""
        active = self._active_plugins()
        if not active:
            return super().forward(input_)
        z = _join([plugin.project(input_) for plugin, _ in active])  # [s, b, sections, r + k]: partial over T
        if self.sequence_parallel:
            z = reduce_scatter_to_sequence_parallel_region(z, group=self.tp_group)
        else:
            z = reduce_from_tensor_model_parallel_region(z, group=self.tp_group)
        widths = [plugin.config.lora_rank + plugin.config.num_experts for plugin, _ in active]
        deltas = [
            plugin.expand(plugin.gate(part, self._rng_context, tokens), 1)
            for (plugin, tokens), part in zip(active, _split(z, widths), strict=True)
        ]
        output, bias = super().forward(input_)
        for delta in deltas:
            output = output + delta
        return output, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Base weight sharded on axis 1, P on axis 1, B replicated."""
        return self._sharded_state_dict({"weight": 1}, prefix, sharded_offsets, metadata)


class HLoRAColumnParallelLinear(HLoRAColumnMixin, ColumnParallelLinear):
    """`ColumnParallelLinear` (QKV, FC1) with H-LoRA."""


class HLoRARowParallelLinear(HLoRARowMixin, RowParallelLinear):
    """`RowParallelLinear` (attention projection, FC2) with H-LoRA."""
