from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.bounds import Above, AtMost, Below, Within
from megatron_hgpt.config import RunConfig
from megatron_hgpt.config_io import check_types, dump, load_config, preset_names, read_config, save_config, to_dict
from megatron_hgpt.errors import ConfigError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_without_anything_the_defaults() -> None:
    assert load_config() == RunConfig()


def test_later_layers_win(tmp_path: Path) -> None:
    write(tmp_path, "common.yaml", "preset: tiny\ntraining: {seed: 1, num_steps: 10}\noptimizer: {lr: 0.1}\n")
    (tmp_path / "runs").mkdir()
    run = write(tmp_path / "runs", "run.yaml", "base: ../common.yaml\ntraining: {seed: 2}\n")
    config = load_config(run, ["optimizer.lr=0.25", "model.vq.num_codes=128"])
    assert config.model.hf_config["hidden_size"] == 128  # preset
    assert config.training.num_steps == 10  # base
    assert config.training.seed == 2  # file over base
    assert config.optimizer.lr == 0.25  # override over all
    assert config.model.vq.num_codes == 128
    assert config.model.vq.num_indices == 64  # a sibling of an override stays the preset's


def test_the_command_line_s_preset_lies_beneath_the_file(tmp_path: Path) -> None:
    run = write(tmp_path, "run.yaml", "model: {template: plain}\n")
    config = load_config(run, preset="healthgpt_xl32")
    assert config.model.template == "plain"
    assert config.model.hf_config["num_hidden_layers"] == 64


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_loads_and_survives_a_round_trip(preset: str, tmp_path: Path) -> None:
    config = load_config(preset=preset)
    path = tmp_path / "deep" / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert path.read_text(encoding="utf-8") == dump(config)
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]  # nothing temporary is left


def test_the_presets_are_the_issue_s() -> None:
    assert {"tiny", "healthgpt_m3", "healthgpt_l14", "healthgpt_xl32"} <= set(preset_names())


def test_an_empty_mapping_clears_a_field_but_not_a_section(tmp_path: Path) -> None:
    file = write(tmp_path, "run.yaml", "data: {mixture: {comprehension: 2}}\ntraining: {seed: 2}\n")
    config = load_config(file, ["data.mixture={}", "training={}"])
    assert config.data.mixture == {}
    assert config.training.seed == 2
    assert load_config(file, ["data.mixture={generation: 1}"]).data.mixture == {"comprehension": 2, "generation": 1}


def test_values_of_overrides_are_yaml() -> None:
    config = load_config(
        None,
        [
            "data.train=[a, b]",
            "data.mixture={comprehension: 1, generation: 0.5}",
            "optimizer.lr=1e-3",
            "parallel.sequence_parallel=true",
            "model.hlora.generation=null",
            "name=a=b",
        ],
    )
    assert config.data.train == ["a", "b"]
    assert config.data.mixture == {"comprehension": 1.0, "generation": 0.5}
    assert config.optimizer.lr == 0.001  # YAML itself reads 1e-3 as text
    assert config.parallel.sequence_parallel is True
    assert config.model.hlora.generation is None
    assert config.name == "a=b"
    assert to_dict(config)["data"]["mixture"]["comprehension"] == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("traning.seed=1", "unknown key traning; did you mean training?"),
        ("training.sed=1", "unknown key training.sed; did you mean training.seed?"),
        ("training.lr=1", "unknown key training.lr; did you mean optimizer.lr?"),
        ("training.lrr=1", "unknown key training.lrr; did you mean optimizer.lr?"),
        ("lora_rank=1", "unknown key lora_rank; did you mean model.hlora."),
        (
            "model.hlora.generation.rank=8",
            "unknown key model.hlora.generation.rank; did you mean model.hlora.generation.lora_rank?",
        ),
        ("data.zzzzz=1", "unknown key data.zzzzz; data has train, validation"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [override])


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    run = write(tmp_path, "run.yaml", "optimizer: {warmup: 0.1}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: unknown key optimizer\.warmup; did you mean .*warmup_ratio"):
        load_config(run)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed=x", "training.seed='x' must be int"),
        ("training.seed=true", "training.seed=True must be int"),  # a bool is an int to Python
        ("training.seed=1.5", "training.seed=1.5 must be int"),
        ("training.seed=null", "training.seed=None must be int"),
        ("training.num_steps=ten", "training.num_steps='ten' must be int (1 to 1000000000) or null"),
        ("optimizer.lr=fast", "optimizer.lr='fast' must be float (0 to 100) or null"),
        ("optimizer.lr=true", "optimizer.lr=True must be float (0 to 100) or null"),
        ("parallel.sequence_parallel=1", "parallel.sequence_parallel=1 must be bool"),
        ("name=5", "name=5 must be str"),
        ("data.train=one", "data.train='one' must be a list, as [data/train]"),
        ("data.mixture=[1]", "data.mixture=[1] must be a mapping, as {key: value}"),
        ("data.train=[1]", "data.train[0]=1 must be str"),
        ("data.mixture={generation: much}", "data.mixture.generation='much' must be float"),
        ("training=5", "training must be a section (a mapping), got 5"),
        ("training=null", "training must be a section (a mapping), got None"),
        ("training.seed.deeper=1", "training.seed={'deeper': 1} must be int"),
    ],
)
def test_a_wrong_type_names_field_value_and_type(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [override])


@pytest.mark.parametrize("override", ["training.seed", "=5", "training.seed: 5"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form section.key=value"):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"training: {seed: 1", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- a\n- b\n", "must hold a mapping of sections, not a list"),
        (b"preset: huge\n", "preset 'huge' is unknown; there are healthgpt_l14"),
        (b"preset: 5\n", "preset=5 must be a name"),
        (b"base: [a.yaml]\n", "base=['a.yaml'] must be a name"),
        (b"base: run.yaml\n", "leads back to itself"),
        (b"base: nowhere.yaml\n", "nowhere.yaml: No such file"),
        (b"name: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),  # a file never runs code
    ],
)
def test_a_bad_file_is_a_config_error(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "empty.yaml", "# nothing yet\n")) == RunConfig()


def test_loaded_configurations_share_nothing() -> None:
    first: Any = load_config(preset="tiny")
    first.model.hf_config["hidden_size"] = 1
    first.data.train.append("x")
    second = load_config(preset="tiny")
    assert second.model.hf_config["hidden_size"] == 128
    assert second.data.train == []


def test_the_file_at_fault_is_named_not_the_one_above_it(tmp_path: Path) -> None:
    beneath = write(tmp_path, "beneath.yaml", "optimizer: {lrr: 1.0}\n")
    above = write(tmp_path, "above.yaml", "base: beneath.yaml\n")
    with pytest.raises(ConfigError, match=re.escape(f"{beneath}: unknown key optimizer.lrr")):
        load_config(above)
    fine = write(tmp_path, "fine.yaml", "name: fine\n")
    with pytest.raises(ConfigError, match="^the command line: training.seed='a' must be int"):
        load_config(fine, ["training.seed=a"])


def test_files_that_lead_to_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: ./c.yaml\n")
    write(tmp_path, "c.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: `base` leads back to itself"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("training: {stage: stage2}\nname: x\ntraining: {num_steps: 3}", "training", "1 and 3"),
        ("optimizer:\n  lr: 1.0\n  clip_grad: 1.0\n  lr: 2.0", "lr", "2 and 4"),
        ("optimizer: {lr: 1.0, lr: 2.0}", "lr", "1 and 1"),
        ("model: {hf_config: {a: [{b: 1, b: 2}]}}", "b", "1 and 1"),
    ],
)
def test_a_repeated_key_is_refused_because_the_first_would_be_lost(
    text: str, key: str, lines: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"run.yaml is not valid YAML: key '{key}' stands on lines {lines}"):
        load_config(write(tmp_path, "run.yaml", text))


def test_the_same_name_in_two_sections_is_no_repetition(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "run.yaml", "model:\n  vq: {path: a}\n  vision: {tower: b}\nname: path\n"))
    assert (config.model.vq.path, config.model.vision.tower) == ("a", "b")


def test_a_message_is_one_line_even_where_yaml_s_own_has_several(tmp_path: Path) -> None:
    # The second is a ValueError of PyYAML's, not a YAMLError: a date that does not exist.
    for text in ("training: {stage: [", "name: 2020-13-45"):
        with pytest.raises(ConfigError, match=r"run\.yaml is not valid YAML: ") as caught:
            load_config(write(tmp_path, "run.yaml", text))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"the value of override 'data\.train=\[a' is not valid YAML"):
        load_config(None, ["data.train=[a"])


def test_lists_replace_and_dictionaries_merge(tmp_path: Path) -> None:
    write(tmp_path, "beneath.yaml", "data: {train: [a, b], mixture: {comprehension: 1, generation: 2}}\n")
    run = write(tmp_path, "run.yaml", "base: beneath.yaml\ndata: {train: [c], mixture: {generation: 3}}\n")
    config = load_config(run)
    assert config.data.train == ["c"]
    assert config.data.mixture == {"comprehension": 1.0, "generation": 3.0}


def test_a_section_that_was_null_can_be_filled_again_with_all_its_sizes() -> None:
    name = "model.hlora.generation"
    sizes = [f"{name}.lora_rank=8", f"{name}.alpha=16", f"{name}.num_experts=2"]
    for overrides, preset in (([f"{name}=null", *sizes], "tiny"), (sizes, "healthgpt_xl32")):
        plugin = load_config(None, overrides, preset=preset).model.hlora.generation
        assert plugin is not None
        assert (plugin.lora_rank, plugin.alpha, plugin.num_experts) == (8, 16.0, 2)


def test_a_part_of_a_plugin_over_one_that_is_null_is_refused() -> None:
    """Its other sizes would be another model's: alpha 512 of M3 beside rank 128 of L14."""
    message = "model.hlora.generation is null .* lacks alpha and num_experts; give lora_rank, alpha and num_experts tog"
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["model.hlora.generation.lora_rank=128"], preset="healthgpt_xl32")


def test_values_beneath_everything_take_the_place_of_defaults() -> None:
    beneath = {"model": {"hlora": {"comprehension": {"lora_rank": 12}}}, "optimizer": {"lr": 1e-4}}
    config, problems = read_config(None, ["optimizer.lr=3e-4"], defaults=beneath)
    assert (config.optimizer.lr, problems) == (3e-4, [])
    assert config.model.hlora.comprehension is not None and config.model.hlora.comprehension.lora_rank == 12
    config, _ = read_config(None, [], "tiny", defaults=beneath)
    assert config.model.hlora == load_config(preset="tiny").model.hlora


def test_a_malformed_override_hides_no_other_problem() -> None:
    config, problems = read_config(None, ["training.seed", "training.sed=1", "training.seed=x", "name=[", "a=1"])
    assert [problem.field for problem in problems] == ["", "", "training.seed", "name", ""]
    assert problems[0].message == "override 'training.seed' is not of the form section.key=value"
    assert "is not valid YAML" in problems[3].message
    assert config == RunConfig()


def test_all_values_that_cannot_be_read_come_in_one_message(tmp_path: Path) -> None:
    write(tmp_path, "beneath.yaml", "training: {seed: x, stage: stage4}\n")
    run = write(tmp_path, "run.yaml", "base: beneath.yaml\noptimizer: {lr: -1.0, lrr: 2}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(run, ["data.packing=mix", "training.num_steps=0"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "6 problems"
    for number, (line, start) in enumerate(
        zip(
            lines[1:],
            [
                f"{tmp_path / 'beneath.yaml'}: training.seed='x' must be int (0 to 2147483647)",
                f"{tmp_path / 'beneath.yaml'}: training.stage='stage4' must be one of stage1_comprehension, stage1_gen",
                f"{run}: optimizer.lr=-1.0 must be float (0 to 100) or null",
                f"{run}: unknown key optimizer.lrr; did you mean optimizer.lr?",
                "the command line: data.packing='mix' must be one of none, by_task, mixed; did you mean mixed?",
                "the command line: training.num_steps=0 must be int (1 to 1000000000) or null",
            ],
            strict=True,
        ),
        start=1,
    ):
        assert line.startswith(f"  {number}. {start}")


def test_what_can_be_read_is_kept_beside_the_problems() -> None:
    config, problems = read_config(None, ["training.seed=5", "training.stage=stage4"])
    assert (config.training.seed, config.training.stage) == (5, "stage3_joint")
    assert [problem.field for problem in problems] == ["training.stage"]


@pytest.mark.parametrize("preset", [None, *preset_names()])
def test_every_default_lies_within_its_own_type(preset: str | None) -> None:
    config = load_config(preset=preset)
    assert check_types(config) == (config, [])


def test_a_value_set_in_python_is_read_as_strictly_as_a_file_s() -> None:
    config: Any = load_config(preset="tiny")
    config.optimizer.lr, config.model.hlora.generation.dropout, config.name = "fast", 1.0, None
    checked, problems = check_types(config)
    assert [problem.message for problem in problems] == [
        "name=None must be str",
        "model.hlora.generation.dropout=1.0 must be float (at least 0 and below 1)",
        "optimizer.lr='fast' must be float (0 to 100) or null",
    ]
    assert (checked.optimizer.lr, checked.name) == (None, "run")


@pytest.mark.parametrize(
    ("bound", "inside", "outside", "text"),
    [
        (AtMost(2**31 - 1), [1, -2], [2**31, 10**400, float("nan"), float("inf")], "at most 2147483647"),
        (Above(0), [0.1, 10**400], [0, -1, float("nan"), float("inf")], "above 0"),
        (Within(0, 1), [0, 1], [-0.1, 1.1, float("nan")], "0 to 1"),
        (Below(0, 1), [0, 0.99], [1, -0.1, float("nan")], "at least 0 and below 1"),
    ],
)
def test_bounds(bound: Any, inside: list[float], outside: list[float], text: str) -> None:
    assert str(bound) == text
    assert all(bound.holds(value) for value in inside)
    assert not any(bound.holds(value) for value in outside)


def test_one_key_of_a_plugin_leaves_its_others_as_they_are() -> None:
    """The two plugins have other defaults than their class: generation's alpha is 512."""
    plugin = load_config(overrides=["model.hlora.generation.lora_rank=128"]).model.hlora.generation
    assert plugin is not None
    assert (plugin.lora_rank, plugin.alpha) == (128, 512.0)
    assert load_config(overrides=["model.hlora.generation=null"]).model.hlora.generation is None
