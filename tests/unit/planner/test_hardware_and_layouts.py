"""Clusters and layouts: what is legal, why the rest is not, and bad input by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megatron_hgpt.config_io import load_config
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.planner.hardware import GPUS, Cluster, gpu_named
from megatron_hgpt.planner.layouts import Layout, legal_layouts, split_layers
from megatron_hgpt.planner.request import Assumptions, PlanRequest, default_supervised_tokens, fixed_sizes


def request(
    preset: str = "healthgpt_l14", *, overrides: Sequence[str] = (), num_gpus: int = 512, **changes: Any
) -> PlanRequest:
    config = load_config(preset=preset, overrides=overrides)
    cluster = Cluster(gpu_name="h100", gpu=GPUS["h100"], num_gpus=num_gpus, gpus_per_node=8)
    return PlanRequest(
        config=config, cluster=cluster, **{"supervised_tokens": default_supervised_tokens(config), **changes}
    )


def test_every_legal_layout_uses_all_gpus_and_shards_what_it_says() -> None:
    layouts, refused = legal_layouts(request(overrides=["model.max_seq_length=4096"]))
    assert {layout.tensor for layout in layouts} == {1, 2}  # of 1, 2, 5, 10 those that divide a node of 8
    assert len({layout.name for layout in layouts}) == len(layouts) > 10
    for layout in layouts:
        assert layout.world_size == 512
        assert sum(layout.layers_per_stage) == 40
        assert 128 % layout.data == 0  # the stage's global batch
    assert any(len(set(layout.layers_per_stage)) > 1 for layout in layouts)
    assert any("tensor_model_parallel_size=4" in reason and "10 KV heads" in reason for reason in refused)


def test_l14_with_tensor_4_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="40 attention heads with 10 KV heads .* use 1, 2, 5, 10"):
        legal_layouts(request(tensor=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor": 16, "preset": "healthgpt_m3"}, "tensor_model_parallel_size=16 does not divide the 8 GPUs"),
        ({"pipeline": 3}, "does not divide 512 GPUs"),
        ({"pipeline": 64}, "pipeline_model_parallel_size=64 exceeds the 40 layers"),
        ({"tensor": 1, "pipeline": 1}, "global_batch_size=128 .* data parallel size .512"),
        ({"pipeline": 4, "first_layers": 9}, "31 of the 40 layers cannot be split evenly over 3 stages"),
        ({"pipeline": 4, "virtual": 3}, "virtual_pipeline_model_parallel_size=3 must divide the layers"),
        (
            {"num_gpus": 1, "first_layers": 9},
            "num_layers_in_first_pipeline_stage=9 .* 40 layers at pipeline_model_parallel_size=1",
        ),
        ({"precision": "fp8", "overrides": ["model.transformer_impl=local"]}, "fp8 needs Transformer Engine"),
        (
            {"tensor": 8, "preset": "healthgpt_m3", "overrides": ["model.vocabulary.pad_to_multiple=1"]},
            "40206 padded vocabulary rows cannot be sharded over tensor_model_parallel_size=8",
        ),
    ],
)
def test_why_a_layout_is_illegal(changes: dict[str, Any], message: str) -> None:
    preset, overrides = changes.pop("preset", "healthgpt_l14"), changes.pop("overrides", [])
    with pytest.raises(ConfigError, match=message):
        legal_layouts(request(preset, overrides=overrides, **changes))


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "expected"),
    [
        (40, 8, (5,) * 8),
        (40, 3, (13, 14, 13)),
        (40, 16, (6, *[2] * 14, 6)),
        (41, 2, (20, 21)),
        (64, 7, (7, *[10] * 5, 7)),
        (5, 5, (1,) * 5),
        (7, 1, (7,)),
    ],
)
def test_layers_are_split_as_equally_as_megatron_can(num_layers: int, num_stages: int, expected: tuple) -> None:
    assert split_layers(num_layers, num_stages) == expected


def test_given_ends_leave_the_rest_to_the_others() -> None:
    assert split_layers(40, 4, 10, 6) == (10, 12, 12, 6)
    assert split_layers(40, 4, first=7) == (7, 11, 11, 11)
    assert split_layers(40, 2, 15, 25) == (15, 25)


def test_uneven_and_interleaved_stages_become_the_trainer_s_fields() -> None:
    ends = Layout(tensor=1, pipeline=3, context=1, data=1, layers_per_stage=(1, 2, 1))
    parallel = ends.parallel_config(distributed_optimizer=False)
    assert (parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage) == (1, 1)
    even = Layout(tensor=1, pipeline=2, context=1, data=1, layers_per_stage=(2, 2), virtual=2)
    parallel = even.parallel_config(distributed_optimizer=False)
    assert (parallel.num_layers_in_first_pipeline_stage, parallel.virtual_pipeline_model_parallel_size) == (None, 2)


def test_samples_are_padded_as_the_trainer_pads_them() -> None:
    layout = Layout(tensor=2, pipeline=1, context=4, data=1, layers_per_stage=(40,))
    assert layout.padded_length(request(overrides=["model.max_seq_length=2044"])) == 2048
    assert layout.padded_length(request(overrides=["model.max_seq_length=2050"], precision="fp8")) == 2176


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gpu_named("h10", {}), "'h10' is unknown; there are a100-40, .* did you mean h100"),
        (lambda: gpu_named("h100", {"memory_gib": -1.0}), "--memory-gib -1.0 must be a positive number"),
        (
            lambda: Cluster(gpu_name="h100", gpu=GPUS["h100"], num_gpus=12, gpus_per_node=8),
            "--num-gpus 12 is not a multiple of --gpus-per-node 8",
        ),
        (lambda: Cluster(gpu_name="h100", gpu=GPUS["h100"], num_gpus=0, gpus_per_node=8), "--num-gpus 0"),
        (lambda: Assumptions(efficiency=1.5), "--efficiency 1.5 must be above 0 and at most 1"),
        (lambda: Assumptions(reserve_gib=float("nan")), "--reserve-gib nan"),
        (lambda: request(precision="int4"), "training.precision='int4' is unknown; use one of bf16, fp8, fp32"),
        (lambda: request(recompute="some"), "training.recompute='some' is unknown"),
        (lambda: request(tensor=0), "parallel.tensor_model_parallel_size=0 must be at least 1"),
        (lambda: request(images_per_sample=-1), "--images-per-sample -1"),
        (lambda: request(overrides=["model.max_seq_length=20000"]), "max_seq_length=20000 exceeds .*=16384"),
        (lambda: request("healthgpt_xl32"), "stage=stage3_joint trains generation, but model.hlora.generation is"),
        (lambda: request(overrides=["training.stage=stage4"]), "training.stage='stage4' must be one of stage1"),
        (lambda: request(overrides=["engine.name=deepspeed"]), "engine.name=deepspeed is not planned for"),
        (lambda: request(overrides=["data.packing=mixed"]), "data.packing=mixed is not planned for"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_size_that_the_user_names_is_fixed_and_the_others_are_searched() -> None:
    """The overrides decide, not the values: a size of 1 that is named is fixed as well."""
    overrides = [
        "parallel.tensor_model_parallel_size=1", "parallel.num_layers_in_last_pipeline_stage=8",
        "parallel.virtual_pipeline_model_parallel_size=null", "training.seed=7",
    ]  # fmt: skip
    parallel = load_config(overrides=overrides).parallel
    assert fixed_sizes(parallel, overrides) == {"tensor": 1, "last_layers": 8}
    assert fixed_sizes(parallel, []) == {}
    sharded = fixed_sizes(parallel, ["parallel.use_distributed_optimizer=false"])
    assert sharded == {"distributed_optimizer": False}
    for refused in ("parallel.sequence_parallel=true", "parallel={context_parallel_size: 2}"):
        with pytest.raises(ConfigError, match="is not searched|one by one"):
            fixed_sizes(parallel, [refused])


def test_fp8_needs_an_fp8_unit() -> None:
    config = load_config(preset="healthgpt_m3")
    cluster = Cluster(gpu_name="a100-80", gpu=GPUS["a100-80"], num_gpus=8, gpus_per_node=8)
    with pytest.raises(ConfigError, match="a100-80 has no FP8 unit"):
        PlanRequest(config=config, cluster=cluster, precision="fp8")


def test_bandwidth_drops_where_a_group_leaves_its_node() -> None:
    cluster = Cluster(gpu_name="h100", gpu=gpu_named("h100", {"network_gb_s": 25.0}), num_gpus=16, gpus_per_node=8)
    assert cluster.bandwidth(8) == 450e9
    assert cluster.bandwidth(9) == 25e9
