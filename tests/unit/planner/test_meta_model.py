"""Models on the meta device: the ranks of a layout add up to the model that the specification counts."""

from __future__ import annotations

import sys

import pytest
import torch

from megatron_hgpt.config_io import load_config
from megatron_hgpt.errors import HealthGPTError
from megatron_hgpt.model.parameter_counts import count_parameters
from megatron_hgpt.planner.hardware import GPUS, Cluster
from megatron_hgpt.planner.layouts import Layout, split_layers
from megatron_hgpt.planner.meta_model import RankModel, build_rank_models, fake_layout, fake_process_group
from megatron_hgpt.planner.request import PlanRequest, default_supervised_tokens


def models_of(
    preset: str, stage: str, tensor: int, pipeline: int, data: int, virtual: int = 1
) -> tuple[dict[str, int], list[RankModel]]:
    config = load_config(preset=preset, overrides=[f"training.stage={stage}", "training.global_batch_size=512"])
    cluster = Cluster(gpu_name="h100", gpu=GPUS["h100"], num_gpus=tensor * pipeline * data, gpus_per_node=8)
    request = PlanRequest(config=config, cluster=cluster, supervised_tokens=default_supervised_tokens(config))
    layers = split_layers(request.shape.num_layers, pipeline)
    layout = Layout(tensor=tensor, pipeline=pipeline, context=1, data=data, layers_per_stage=layers, virtual=virtual)
    return count_parameters(config.model), build_rank_models(request, layout)


def total(models: list[RankModel], *names: str) -> int:
    return sum(model.count(*names) for model in models)


@pytest.mark.parametrize(
    ("preset", "stage", "pipeline"),
    [
        ("healthgpt_m3", "stage3_joint", 4),
        ("healthgpt_l14", "stage3_joint", 3),
        ("healthgpt_xl32", "stage3_comprehension", 8),
    ],
)
def test_pipeline_ranks_add_up_to_the_specified_model(preset: str, stage: str, pipeline: int) -> None:
    counts, models = models_of(preset, stage, 1, pipeline, 2)
    assert total(models, "base_linears", "norms") == counts["backbone"]
    assert total(models, "embedding") == models[0].count("embedding") == counts["embeddings"]
    assert total(models, "head") == models[-1].count("head") == counts["head"]
    for name in ("abstract_adapter", "concrete_adapter", "hlora_comprehension", "hlora_generation"):
        assert total(models, name) == counts.get(name, 0), name
        assert total(models, name) == sum(model.count(name, trained=True) for model in models)
    # Block 24 of the tower lies behind the deepest feature: the model does not hold it, nor the norm after it.
    assert total(models, "tower") == models[0].count("tower") < counts["tower"]
    assert all(model.bytes() == 2 * model.count() for model in models)


def test_a_thousand_ranks_shard_what_megatron_shards() -> None:
    counts, whole = models_of("healthgpt_l14", "stage3_joint", 1, 1, 1)
    _, ranks = models_of("healthgpt_l14", "stage3_joint", 2, 16, 32)  # 1,024 ranks
    assert [model.num_layers for model in ranks] == [6] + [2] * 14 + [6]
    assert 2 * total(ranks, "base_linears") == whole[0].count("base_linears")
    assert 2 * total(ranks, "embedding", "head") == counts["embeddings"] + counts["head"]
    assert total(ranks, "norms") == whole[0].count("norms")
    plugins = ("hlora_comprehension", "hlora_generation")
    replicated = sum(model.tensor_reduced_numel for model in ranks)
    assert 2 * (total(ranks, *plugins) - replicated) + replicated == total(whole, *plugins)
    assert all(sum(map(sum, m.trained_numels)) == m.count(trained=True) for m in ranks)


def test_a_stage_trains_its_groups_only() -> None:
    _, (model,) = models_of("healthgpt_m3", "stage1_generation", 1, 1, 1)
    trained = {group.name for group in model.groups if group.is_trained}
    assert trained == {"concrete_adapter", "hlora_generation", "embedding", "head"}


def test_the_parallel_state_is_the_layout_s_and_is_closed_again() -> None:
    layout = Layout(tensor=2, pipeline=4, context=2, data=64, layers_per_stage=(10,) * 4)
    with fake_layout(layout, 2):
        from megatron.core import parallel_state

        assert torch.distributed.get_world_size() == 1024
        assert parallel_state.get_pipeline_model_parallel_rank() == 2
        assert parallel_state.get_data_parallel_world_size() == 64
        assert parallel_state.get_context_parallel_world_size() == 2
    assert not torch.distributed.is_initialized()
    with fake_process_group(4, 0), pytest.raises(HealthGPTError, match="process of its own"), fake_layout(layout, 0):
        pass


def test_interleaved_chunks_add_up_to_the_stages_they_cut() -> None:
    _, whole = models_of("healthgpt_l14", "stage3_joint", 1, 4, 1)
    _, cut = models_of("healthgpt_l14", "stage3_joint", 1, 4, 1, virtual=5)
    for stage, chunks in zip(whole, cut, strict=True):
        assert (len(stage.trained_numels), len(chunks.trained_numels)) == (1, 5)
        assert chunks.num_layers == stage.num_layers == 10
        assert {(g.name, g.num_bytes) for g in chunks.groups} == {(g.name, g.num_bytes) for g in stage.groups}


def test_the_fake_process_group_leaves_tracebacks_as_they_were() -> None:
    before = sys.excepthook
    with fake_process_group(8, 4):
        pass
    assert sys.excepthook is before
