from __future__ import annotations

from typing import cast

import pytest
from torch import nn

from megatron_hgpt.model.healthgpt import HealthGPT
from megatron_hgpt.parameters import (
    GROUP_TASK,
    canonical_name,
    chunk_prefix,
    group_of,
    named_parameters,
    parameter_groups,
)
from megatron_hgpt.samples import Task

LAYER = "language_model.decoder.layers.3."


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("adapters.comprehension.fc1.weight", "abstract_adapter"),
        ("adapters.generation.fc2.bias", "concrete_adapter"),
        (LAYER + "self_attention.linear_qkv.hlora.comprehension.lora_p", "hlora_comprehension"),
        (LAYER + "mlp.linear_fc2.hlora.generation.lora_b.0", "hlora_generation"),
        ("language_model.embedding.word_embeddings.weight", "vocabulary"),
        ("language_model.output_layer.weight", "vocabulary"),
        ("tower.blocks.0.weight", "tower"),
        (LAYER + "self_attention.linear_qkv.weight", "backbone"),
        ("module.chunk 0/adapters.generation.fc2.bias", "concrete_adapter"),
    ],
)
def test_a_parameter_s_name_says_its_group(name: str, group: str) -> None:
    assert group_of(name) == group


def test_both_tasks_have_an_adapter_and_plugins_of_their_own() -> None:
    for task in Task:
        assert [group for group, owner in GROUP_TASK.items() if owner is task] == [
            "abstract_adapter" if task is Task.COMPREHENSION else "concrete_adapter",
            f"hlora_{task.value}",
        ]


def test_new_rows_are_parameters_of_the_vocabulary() -> None:
    assert parameter_groups(["new_rows", "concrete_adapter"]) == {"vocabulary", "concrete_adapter"}


@pytest.mark.parametrize(
    ("name", "offset", "canonical"),
    [
        ("decoder.layers.0.mlp.linear_fc1.weight", 12, "decoder.layers.12.mlp.linear_fc1.weight"),
        ("module.language_model.decoder.layers.10.x.lora_b.0", 5, "language_model.decoder.layers.15.x.lora_b.0"),
        ("tower.layers.3.weight", 12, "tower.layers.3.weight"),
    ],
)
def test_layers_are_numbered_through_all_pipeline_stages(name: str, offset: int, canonical: str) -> None:
    assert canonical_name(name, offset) == canonical


def test_chunks_of_equal_names_are_told_apart() -> None:
    chunks = cast(list[HealthGPT], [nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    assert list(named_parameters(chunks[:1])) == ["weight"]
    named = named_parameters(chunks)
    assert list(named) == ["chunk 0/weight", "chunk 1/weight"]
    assert named[chunk_prefix(chunks, 1) + "weight"] is chunks[1].get_parameter("weight")
