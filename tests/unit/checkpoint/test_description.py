"""What a checkpoint says about itself, in this and earlier formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.checkpoint.description import FORMAT_VERSION, check_fits, fingerprint, read_info
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.testing.models import tiny_config, write_backbone


def _write(folder: Path, version: Any, stored: dict[str, Any]) -> Path:
    folder.mkdir()
    info = {"format_version": version, "fingerprint": stored, "base": {}}
    (folder / "healthgpt.json").write_text(json.dumps(info))
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
    other = _write(tmp_path / "step_00000002", 1, stored)
    with pytest.raises(CheckpointError, match=r"backbone\.num_layers: the model has (\d+), the checkpoint \d+\."):
        check_fits(config, {}, other, read_info(other))


def test_heads_that_version_1_left_out_have_their_defaults(tmp_path: Path) -> None:
    sizes = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    shape = read_info(_write(tmp_path / "step_00000001", 1, {"backbone": sizes}))["fingerprint"]["backbone"]
    assert (shape["family"], shape["num_kv_heads"], shape["head_dim"]) == ("llama", 4, 16)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, None])
def test_another_format_is_refused_with_what_to_do(version: int | None, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"format_version {version} is not .* \(1 to {FORMAT_VERSION}\); use the version"
    ):
        read_info(_write(tmp_path / "step_00000001", version, {}))
