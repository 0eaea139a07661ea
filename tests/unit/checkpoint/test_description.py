"""What a checkpoint says about itself, in this and earlier formats; what it cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.checkpoint.description import FORMAT_VERSION, INFO, check_fits, fingerprint, read_info
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.files import sealed
from megatron_hgpt.testing.models import tiny_config, write_backbone

FILE = {"bytes": 3, "sha256": "ab"}
VALID: dict[str, Any] = {
    "stage": "stage2",
    "step": 1,
    "trained_groups": ["vocabulary", "new_rows"],
    "optimizer_steps": {"vocabulary": 1},
    "loader": {"step": 1},
    "rng_layout": [1, 2, 1],
    "fingerprint": {},
    "base": {},
}


def _write(folder: Path, version: Any, stored: dict[str, Any], **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    info = {**VALID, "format_version": version, "fingerprint": stored, **fields}
    if version == FORMAT_VERSION:
        files = {".metadata": FILE, "resolved_config.yaml": FILE}
        info = sealed({"is_healthy": True, "files": files, **info})
    (folder / INFO).write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_version_1_named_the_shape_by_keys_of_config_json(family: str, tmp_path: Path) -> None:
    config = tiny_config(write_backbone(tmp_path / "backbone", family), tmp_path)
    keys = (
        "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim",
    )  # fmt: skip
    sizes = {key: config.model.hf_config[key] for key in keys if key in config.model.hf_config}
    stored = {**fingerprint(config.model), "backbone": sizes}
    folder = _write(tmp_path / "step_00000001", 1, stored)
    check_fits(config, {}, folder, read_info(folder))
    sizes["num_hidden_layers"] += 1
    other = _write(tmp_path / "other", 1, stored)
    with pytest.raises(CheckpointError, match=r"backbone\.num_layers: the model has (\d+), the checkpoint \d+\."):
        check_fits(config, {}, other, read_info(other))


def test_heads_that_version_1_left_out_have_their_defaults(tmp_path: Path) -> None:
    sizes = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    shape = read_info(_write(tmp_path / "step_00000001", 1, {"backbone": sizes}))["fingerprint"]["backbone"]
    assert (shape["family"], shape["num_kv_heads"], shape["head_dim"]) == ("llama", 4, 16)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"architectures": []},
        {"architectures": ["X"], "num_attention_heads": 0},
        {"architectures": ["LlamaForCausalLM"]},
    ],
)
def test_a_shape_of_version_1_that_is_none_is_refused(sizes: dict[str, Any], tmp_path: Path) -> None:
    folder = _write(tmp_path / "step_00000001", 1, {"backbone": sizes})
    with pytest.raises(CheckpointError, match=r"healthgpt\.json is damaged: fingerprint\.backbone"):
        read_info(folder)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, None, "2", True, 2.0])
def test_another_format_is_refused_with_what_to_do(version: Any, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"format_version {version!r} is not .* \(1 to {FORMAT_VERSION}\); use the version"
    ):
        read_info(_write(tmp_path / "step_00000001", version, {}))


@pytest.mark.parametrize("version", [2, FORMAT_VERSION])
def test_valid_descriptions_are_read(version: int, tmp_path: Path) -> None:
    info = read_info(_write(tmp_path / "step_00000001", version, {}))
    assert info["is_healthy"] is True and len(info["digest"]) == 64
    assert sorted(info["files"]) == ([] if version == 2 else [".metadata", "resolved_config.yaml"])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("step", -5, "step is -5, not a number of steps"),
        ("step", "1", "step is 1, not a number of steps"),
        ("step", True, "step is True, not"),
        ("step", 1e9, "step is 1000000000.0, not"),
        ("step", 2**70, "not a number of steps"),
        ("step", 2, "it is of step 2, in a folder of step 1"),
        ("stage", None, "stage is None, not a stage"),
        ("stage", "x" * 10000, "stage is xxxx"),
        ("trained_groups", "vocabulary", "trained_groups is vocabulary, not a list of groups"),
        ("trained_groups", ["tower"], "not a list of groups of parameters"),
        ("trained_groups", [["vocabulary"]], "not a list of groups of parameters"),
        ("optimizer_steps", {"vocabulary": -1}, "not a mapping to numbers of steps"),
        ("optimizer_steps", [], "not a mapping to numbers of steps"),
        ("loader", {}, "loader is {}, not a mapping with a step"),
        ("loader", {"step": -1}, "not a mapping with a step"),
        ("rng_layout", [1, 2], "not a list of three sizes"),
        ("rng_layout", [1, 0, 1], "not a list of three sizes"),
        ("fingerprint", [], "not a mapping to mappings"),
        ("fingerprint", {"vision": {"a": {"b": {}}}}, "not a mapping to mappings"),
        ("base", {"backbone": 7}, "not a mapping to texts"),
    ],
)
@pytest.mark.parametrize("version", [2, FORMAT_VERSION])
def test_a_value_that_cannot_be_is_refused(version: int, field: str, value: Any, said: str, tmp_path: Path) -> None:
    """Sealed anew: the digest is right, the value is not."""
    folder = _write(tmp_path / "step_00000001", version, {}, **{field: value})
    with pytest.raises(CheckpointError, match=r"healthgpt\.json is damaged") as caught:
        read_info(folder)
    assert said in str(caught.value) and len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", VALID)
def test_a_field_that_is_missing_is_named(field: str, tmp_path: Path) -> None:
    folder = _write(tmp_path / "step_00000001", 2, {})
    info = json.loads((folder / INFO).read_text())
    del info[field]
    (folder / INFO).write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match=f"it has no {field}"):
        read_info(folder)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "files does not list .metadata"),
        ({".metadata": FILE}, "files does not list resolved_config.yaml"),
        ({"../x": FILE, ".metadata": FILE, "resolved_config.yaml": FILE}, "'../x' is no file of the folder"),
        ({".metadata": {"bytes": -1, "sha256": "ab"}}, "not a mapping to bytes and sha256"),
        ({".metadata": {"bytes": 1}}, "not a mapping to bytes and sha256"),
        ([], "not a mapping to bytes and sha256"),
    ],
)
def test_files_must_be_those_of_the_folder(files: Any, said: str, tmp_path: Path) -> None:
    folder = _write(tmp_path / "step_00000001", FORMAT_VERSION, {}, files=files)
    with pytest.raises(CheckpointError) as caught:
        read_info(folder)
    assert said in str(caught.value)


def test_a_description_that_was_changed_is_damaged(tmp_path: Path) -> None:
    folder = _write(tmp_path / "step_00000001", FORMAT_VERSION, {})
    text = (folder / INFO).read_text()
    for changed in (text.replace("stage2", "stage3"), text.replace('"digest"', '"digests"')):
        (folder / INFO).write_text(changed)
        with pytest.raises(CheckpointError, match="its digest is not that of its content"):
            read_info(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"a":' * 100_000, "\x00", '"x"'])
def test_what_is_no_json_object_is_one_line(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / INFO).write_text(content)
    with pytest.raises(CheckpointError, match=r"healthgpt\.json") as caught:
        read_info(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_huge_description_is_not_read(tmp_path: Path) -> None:
    folder = _write(tmp_path / "step_00000001", 2, {})
    with (folder / INFO).open("r+b") as stream:
        stream.truncate(2**32)
    with pytest.raises(CheckpointError, match="is refused: 4294967296 bytes"):
        read_info(folder)
