from __future__ import annotations

import doctest

import pytest
import torch

from megatron_hgpt.config import HLoRAPluginConfig
from megatron_hgpt.hlora import plugins
from megatron_hgpt.hlora.plugins import BranchLayout, HLoRAPlugin

KV_GROUPS = 4
QKV = BranchLayout(part_sizes=(24, 8, 8), part_names=("q", "k", "v"), num_sections=3, interleave_groups=KV_GROUPS)


def test_the_example_of_the_branch_layout_is_true() -> None:
    result = doctest.testmod(plugins, raise_on_error=False)
    assert result.attempted >= 7
    assert result.failed == 0


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, -1])
def test_the_ranks_rows_one_after_another_are_the_whole_linear_s(tp_size: int, dim: int) -> None:
    parts = [torch.arange(size) + 100 * i for i, size in enumerate(QKV.part_sizes)]
    parts = [part.unsqueeze(1 if dim == 0 else 0) for part in parts]
    shards = [
        QKV.assemble([part.chunk(tp_size, dim)[rank] for part in parts], tp_size, dim=dim) for rank in range(tp_size)
    ]
    assert torch.equal(torch.cat(shards, dim), QKV.assemble(parts, 1, dim=dim))


@pytest.mark.parametrize("num_sections", [1, 3])
def test_a_plugin_starts_by_adding_nothing(num_sections: int) -> None:
    layout = BranchLayout(part_sizes=(24, 8, 8), num_sections=num_sections, interleave_groups=KV_GROUPS)
    config = HLoRAPluginConfig(lora_rank=4, num_experts=2)
    plugin = HLoRAPlugin(
        config, layout, input_size=6, output_divisor=1, dtype=torch.float64, device=torch.device("cpu")
    )
    torch.nn.init.normal_(plugin.lora_p)
    assert plugin.lora_p.shape == (num_sections * 6, 6)
    u = torch.randn(3, 2, num_sections, 4, dtype=torch.float64)
    assert plugin.expand(u, 1).shape == (3, 2, 40)
    assert not plugin.expand(u, 1).any()
