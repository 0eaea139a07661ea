"""The command line, with a real (tiny) tokenizer and VQGAN-free records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_hgpt.cli import main
from megatron_hgpt.data.mmap_format import read_manifest
from megatron_hgpt.demo.tokenizers import make_tiny_tokenizer


def preprocess(arguments: list[str]) -> int:
    return main(["preprocess", *arguments])


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nCT?"}, {"from": "gpt", "value": "no"}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    tokenizer = make_tiny_tokenizer(tmp_path / "tokenizer")
    return [
        *("--input", str(tmp_path / "train.json"), "--output", str(tmp_path / "data"), "--workers", "2"),
        *(f"model.tokenizer={tokenizer}", "model.vocabulary.text_size=400", "model.vq.num_codes=16"),
        "model.system_prompt=Hi.",
    ]


def test_writes_a_dataset(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preprocess(arguments) == 0
    manifest = read_manifest(tmp_path / "data", verify_checksums=True)
    assert manifest["template"] == {"name": "phi3_instruct", "system_prompt": "Hi."}
    assert manifest["vocabulary"]["size"] == 400 + 16 + 3
    assert manifest["creation"]["num_image_tokens"] == 576  # CLIP ViT-L/14-336
    assert "1 samples {'comprehension': 1}, 1 pictures" in capsys.readouterr().out
    assert preprocess(arguments) == 2  # exists already
    assert "DataError" in capsys.readouterr().err
    assert preprocess([*arguments, "--overwrite"]) == 0


def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    without_tokenizer = [argument for argument in arguments if not argument.startswith("model.tokenizer")]
    for changed, message in (
        (
            [*arguments, "model.vocabulary.text_size=9"],
            "ConfigError: model.vocabulary.text_size=9, but the tok",
        ),
        (
            [*arguments, "model.template=phi5"],
            "ConfigError: the command line: model.template='phi5' must be",
        ),
        (without_tokenizer, "ConfigError: neither model.tokenizer nor model.backbone"),
    ):
        assert preprocess(changed) == 2
        error = capsys.readouterr().err.strip()
        assert error.splitlines()[-1].startswith(message)
