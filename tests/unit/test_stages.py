from __future__ import annotations

import dataclasses
import typing

import pytest

from megatron_hgpt.config import StageName, TrainingConfig
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.parameters import GROUP_TASK, group_of
from megatron_hgpt.samples import Task
from megatron_hgpt.stages import STAGES, Stage, resolve_stage

C, G = Task.COMPREHENSION, Task.GENERATION

# HealthGPT paper, section 4 (what trains) and appendix (hyper-parameters): tasks, groups, learning rate, that of
# adapters beside other groups, samples per step, warm-up share, schedule.
PUBLISHED = {
    "stage1_comprehension": ({C}, {"abstract_adapter"}, 1e-3, None, 256, 0.03, "cosine"),
    "stage1_generation": ({G}, {"concrete_adapter", "hlora_generation", "new_rows"}, 2e-4, 2e-5, 64, 0.03, "cosine"),
    "stage2": ({C, G}, {"vocabulary"}, 2e-4, 2e-5, 32, 0.0, "constant"),
    "stage3_comprehension": ({C}, {"abstract_adapter", "hlora_comprehension"}, 2e-4, 2e-5, 128, 0.03, "cosine"),
    "stage3_generation": ({G}, {"concrete_adapter", "hlora_generation"}, 2e-4, 2e-5, 64, 0.03, "cosine"),
}


def resolve(stage: str, **choices: object) -> Stage:
    return resolve_stage(dataclasses.replace(TrainingConfig(stage=stage), **choices))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_is_the_paper_s(name: str) -> None:
    tasks, groups, lr, adapter_lr, batch, warmup, schedule = PUBLISHED[name]
    stage = resolve(name)
    assert set(stage.tasks) == tasks
    assert set(stage.trainable) == groups
    assert len(stage.trainable) == len(groups)
    assert (stage.lr, stage.global_batch_size, stage.warmup_ratio, stage.schedule) == (lr, batch, warmup, schedule)
    if adapter_lr is not None:
        assert stage.adapter_lr == adapter_lr


def test_joint_rows_train_what_the_two_runs_train() -> None:
    assert set(STAGES) - set(PUBLISHED) == {"stage1_joint", "stage3_joint"}
    for number in (1, 3):
        apart = [resolve(f"stage{number}_{task.value}") for task in (C, G)]
        joint = resolve(f"stage{number}_joint")
        assert set(joint.trainable) == {group for stage in apart for group in stage.trainable}
        assert set(joint.tasks) == {C, G}
    assert resolve("stage3_joint").lr == 2e-4
    assert resolve("stage3_joint").adapter_lr == 2e-5


@pytest.mark.parametrize("name", STAGES)
def test_frozen_parts_are_in_no_row_and_a_task_s_groups_come_with_its_samples(name: str) -> None:
    stage = resolve(name)
    assert not {"backbone", "tower"} & set(stage.trainable)
    # A group that trains without samples of its task would never move.
    assert {GROUP_TASK[group] for group in stage.trainable if group in GROUP_TASK} <= set(stage.tasks)


def test_only_stage_1_comprehension_sets_a_dropout() -> None:
    for name in STAGES:
        expected = {C: 0.0} if name in ("stage1_comprehension", "stage1_joint") else {}
        assert dict(resolve(name).dropout) == expected, name


@pytest.mark.parametrize("name", ["stage1_generation", "stage1_joint"])
def test_new_rows_full_rows_or_none(name: str) -> None:
    others = set(resolve(name).trainable) - {"new_rows"}
    assert set(resolve(name, new_rows="rows").trainable) == others | {"new_rows"}
    assert set(resolve(name, new_rows="full").trainable) == others | {"vocabulary"}
    assert set(resolve(name, new_rows="none").trainable) == others


@pytest.mark.parametrize("choice", ["full", "none"])
def test_the_choice_of_rows_concerns_stage_1_generation_alone(choice: str) -> None:
    for name in ("stage1_comprehension", "stage2", "stage3_joint"):
        assert resolve(name, new_rows=choice) == resolve(name)


def test_adapters_in_stage_2() -> None:
    stage = resolve("stage2", train_adapters_in_stage2=True)
    assert set(stage.trainable) == {"vocabulary", "abstract_adapter", "concrete_adapter"}
    assert [stage.lr_of(group) for group in ("vocabulary", "abstract_adapter", "concrete_adapter")] == [
        2e-4,
        2e-5,
        2e-5,
    ]
    assert resolve("stage3_joint", train_adapters_in_stage2=True) == resolve("stage3_joint")


def test_resolving_leaves_the_table_alone() -> None:
    before = dict(STAGES)
    resolve("stage2", train_adapters_in_stage2=True)
    resolve("stage1_joint", new_rows="none")
    assert dict(STAGES) == before
    assert STAGES["stage2"].trainable == ("vocabulary",)


def test_adapters_have_their_own_rate_beside_others_and_the_main_one_alone() -> None:
    alone, beside = resolve("stage1_comprehension"), resolve("stage3_comprehension")
    assert alone.lr_of("abstract_adapter") == 1e-3
    assert alone.lr_of("abstract_adapter", lr=5.0, adapter_lr=7.0) == 5.0
    assert beside.lr_of("abstract_adapter") == 2e-5
    assert beside.lr_of("hlora_comprehension") == 2e-4
    assert beside.lr_of("abstract_adapter", lr=5.0) == 2e-5
    assert beside.lr_of("abstract_adapter", lr=5.0, adapter_lr=7.0) == 7.0
    assert beside.lr_of("hlora_comprehension", lr=5.0, adapter_lr=7.0) == 5.0
    assert beside.lr_of("hlora_comprehension", lr=0.0) == 0.0  # zero is a rate, not "unset"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("adapters.comprehension.0.weight", "abstract_adapter"),
        ("adapters.generation.2.bias", "concrete_adapter"),
        ("language_model.decoder.layers.3.self_attention.linear_qkv.hlora.comprehension.a", "hlora_comprehension"),
        ("module.language_model.decoder.layers.0.mlp.linear_fc2.hlora.generation.route", "hlora_generation"),
        ("language_model.embedding.word_embeddings.weight", "vocabulary"),
        ("language_model.output_layer.weight", "vocabulary"),
        ("language_model.decoder.layers.3.self_attention.linear_qkv.weight", "backbone"),
        ("language_model.decoder.final_layernorm.weight", "backbone"),
        ("tower.blocks.0.self_attn.q_proj.weight", "tower"),
        ("tower.embeddings.patch_embedding.weight", "tower"),
    ],
)
def test_groups_by_parameter_name(name: str, group: str) -> None:
    assert group_of(name) == group
    assert group_of(f"module.module.{name}") == group  # as the data-parallel and precision wrappers prefix it


def test_unknown_stage() -> None:
    with pytest.raises(ConfigError, match="training.stage='stage4' is unknown; use one of stage1_comprehension, "):
        resolve("stage4")


def test_the_type_of_the_field_names_every_row_of_the_table() -> None:
    assert list(typing.get_args(StageName)) == list(STAGES)
