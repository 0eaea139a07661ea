"""The decoder layer of HealthGPT as a megatron.core layer spec: H-LoRA on every linear of the LLM.

How a layer knows the task: Megatron's layers take no extra arguments, and a selector set by the forward step would be
stale when recomputation or a pipeline schedule runs a layer again during another micro-batch's backward. So the task
travels with the arguments that Megatron captures, on a subclass of `PackedSeqParams`, and `HLoRATransformerLayer`
hands it to its linears each time it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_hgpt.backbone.attention import SDPACoreAttention
from megatron_hgpt.backbone.implementation import LOCAL, TRANSFORMER_ENGINE
from megatron_hgpt.backbone.names import FUSED_NORM_PREFIXES
from megatron_hgpt.config import HLoRAPluginConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.hlora.linear import HLoRAColumnParallelLinear, HLoRALinearMixin, HLoRARowParallelLinear
from megatron_hgpt.hlora.plugins import BranchLayout
from megatron_hgpt.samples import MicroBatch, Task

if TYPE_CHECKING:
    from megatron_hgpt.backbone.shape import BackboneShape


@dataclass
class TaskRouting(PackedSeqParams):
    """The task of a micro-batch, travelling where Megatron carries packed-sequence parameters."""

    task: Task | None = None
    """The plugin to run; None runs the bare backbone, or with `token_tasks` both."""
    token_tasks: torch.Tensor | None = None
    """uint8 [s]: `Task.code` of every token (unsharded), in a pack of both tasks."""
    boundaries: tuple[int, ...] = ()
    """`cu_seqlens_q` on the host: start of each packed sample, and s. Empty without packing."""

    @classmethod
    def of(cls, task: Task | None, sequence_length: int) -> TaskRouting:
        """Routing of an unpacked micro-batch; `sequence_length` (tokens, unsharded) sizes the rotary table."""
        return cls(task=task, max_seqlen_q=sequence_length, max_seqlen_kv=sequence_length)

    @classmethod
    def of_batch(cls, batch: MicroBatch) -> TaskRouting:
        """Routing of a micro-batch, packed (Megatron's thd format, one row) or not."""
        if not batch.boundaries:
            return cls.of(batch.task, batch.tokens.shape[1])
        longest = max(end - start for start, end in pairwise(batch.boundaries))
        ends = torch.tensor(batch.boundaries, dtype=torch.int32, device=batch.tokens.device)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            task=batch.task,
            token_tasks=None if batch.token_tasks is None else batch.token_tasks[0],
            boundaries=batch.boundaries,
        )


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may run on sequence-sharded tokens; its weight says so to Megatron's gradient finalisation."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class HLoRATransformerLayer(TransformerLayer):
    """A transformer layer that selects the H-LoRA plugin of the micro-batch it is running."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hlora_linears = tuple(module for module in self.modules() if isinstance(module, HLoRALinearMixin))

    def forward(
        self, *args: Any, packed_seq_params: TaskRouting | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `TransformerLayer.forward`. `packed_seq_params` brings the tasks; Megatron sees it only with packing."""
        routing = TaskRouting() if packed_seq_params is None else packed_seq_params
        for linear in self._hlora_linears:
            linear.active_task, linear.token_tasks = routing.task, routing.token_tasks
        return super().forward(*args, packed_seq_params=routing if routing.boundaries else None, **kwargs)


def linear_layouts(shape: BackboneShape) -> dict[str, BranchLayout]:
    """The branch layout of each fused linear of one layer, by Megatron's name."""
    query = shape.num_heads * shape.head_dim
    key = shape.num_kv_heads * shape.head_dim
    return {
        "linear_qkv": BranchLayout(
            part_sizes=(query, key, key),
            part_names=("q", "k", "v"),
            num_sections=1 if shape.fused_qkv else 3,
            interleave_groups=shape.num_kv_heads,
        ),
        "linear_proj": BranchLayout(part_sizes=(shape.hidden_size,)),
        "linear_fc1": BranchLayout(
            part_sizes=(shape.ffn_size, shape.ffn_size),
            part_names=("gate", "up"),
            num_sections=1 if shape.fused_qkv else 2,
        ),
        "linear_fc2": BranchLayout(part_sizes=(shape.hidden_size,)),
    }


@dataclass(frozen=True, kw_only=True)
class LayerModules:
    """The classes one implementation builds a decoder layer from."""

    qkv: type
    fc1: type
    row: type
    """Attention projection and FC2."""
    core_attention: type
    norm_before_linear: type
    """In front of QKV and FC1; an identity where those linears hold the norm themselves."""
    final_norm: type
    keys_map: Mapping[str, str]
    """Prefixes within a layer of checkpoint keys -> what files call them."""


def layer_modules(transformer_impl: str) -> LayerModules:
    """The classes of ``local`` or ``transformer_engine``; the latter must be installed.

    Raises:
        ConfigError: another name.
    """
    if transformer_impl == LOCAL:
        return LayerModules(
            qkv=HLoRAColumnParallelLinear,
            fc1=HLoRAColumnParallelLinear,
            row=HLoRARowParallelLinear,
            core_attention=SDPACoreAttention,
            norm_before_linear=SequenceParallelRMSNorm,
            final_norm=SequenceParallelRMSNorm,
            keys_map={},
        )
    if transformer_impl == TRANSFORMER_ENGINE:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

        from megatron_hgpt.hlora import te_linear

        return LayerModules(
            qkv=te_linear.HLoRATELayerNormColumnParallelLinear,
            fc1=te_linear.HLoRATELayerNormColumnParallelLinear,
            row=te_linear.HLoRATERowParallelLinear,
            core_attention=TEDotProductAttention,
            norm_before_linear=IdentityOp,
            final_norm=TENorm,
            keys_map=FUSED_NORM_PREFIXES,
        )
    raise ConfigError(f"TransformerConfig.transformer_impl={transformer_impl!r} has no H-LoRA layers; use local")


def hlora_block_spec(
    config: TransformerConfig,
    shape: BackboneShape,
    plugins: Mapping[Task, HLoRAPluginConfig],
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The decoder block of `config.transformer_impl`, H-LoRA on QKV, projection, FC1 and FC2.

    Args:
        config: Megatron's transformer configuration.
        shape: the backbone, which decides how each branch is cut.
        plugins: plugins to hang on every linear; may be empty.
        vp_stage: model chunk of this pipeline stage under the interleaved schedule.

    Raises:
        ConfigError: an implementation without H-LoRA layers.
    """
    layouts = linear_layouts(shape)
    modules = layer_modules(config.transformer_impl)

    def linear(name: str, module: type) -> ModuleSpec:
        return ModuleSpec(module=module, params={"hlora_plugins": plugins, "hlora_layout": layouts[name]})

    layer = ModuleSpec(
        module=HLoRATransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=modules.norm_before_linear,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear("linear_qkv", modules.qkv),
                    core_attention=modules.core_attention,
                    linear_proj=linear("linear_proj", modules.row),
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=modules.norm_before_linear,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=linear("linear_fc1", modules.fc1), linear_fc2=linear("linear_fc2", modules.row)
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(modules.keys_map),
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=modules.final_norm
    )
