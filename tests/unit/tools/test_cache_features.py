"""The command of docs/data.md, as it stands there, on a small dataset."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megatron_hgpt.cli import main
from megatron_hgpt.config_io import load_config
from megatron_hgpt.data.feature_cache import read_cache_manifest
from megatron_hgpt.data.preprocess import Input, PreprocessOptions, preprocess
from megatron_hgpt.demo.tokenizers import make_tiny_tokenizer
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary
from megatron_hgpt.validation import validate

ROOT = Path(__file__).parents[3]


def cache(arguments: list[str]) -> int:
    return main(["cache-features", *arguments])


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """my_run.yaml in an empty folder, for two datasets of two records about one picture."""
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").save("a.png")
    turns = '[{"from": "human", "value": "<image>\\nCT?"}, {"from": "gpt", "value": "no"}]'
    records = [f'{{"id": "{name}", "image": "a.png", "conversations": {turns}}}' for name in "ab"]
    Path("records.jsonl").write_text("\n".join(records))
    tokenizer = make_tiny_tokenizer(tmp_path / "tokenizer")
    for split in ("train", "held-out"):
        preprocess(
            [Input(path=Path("records.jsonl"))], Path("data") / split, tokenizer=TextTokenizer.load(tokenizer),
            vocabulary=Vocabulary(text_size=640, num_codes=256),
            options=PreprocessOptions(template="plain", num_indices=64),
        )  # fmt: skip
    values = {
        "preset": "tiny",
        "model": {"tokenizer": "tokenizer"},
        "data": {"train": ["data/train"], "validation": ["data/held-out"]},
        "training": {"stage": "stage1_comprehension", "num_steps": 2, "precision": "fp32"},
    }
    Path("my_run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "my_run.yaml"


def documented(command: str) -> list[str]:
    """Arguments of the command as docs/data.md has it."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^ +hgpt {command} (.*)$", text, re.M)
    return shlex.split(line, comments=True)


def test_the_documented_commands(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache(documented("cache-features")) == 0
    assert "{'comprehension': 1, 'generation': 0} distinct pictures for 2 images" in capsys.readouterr().out
    manifest = read_cache_manifest(Path("data/held-out/features"))
    assert (manifest["dtype"], manifest["files"]["comprehension.bin"]) == ("fp32", 64 * 128 * 4)
    trained: list[str] = []
    monkeypatch.setattr("megatron_hgpt.run_stage.main", lambda run: trained.append(str(run.data.feature_cache)))
    assert main(["train", *documented("train"), "launch.max_restarts=0"]) == 0
    assert trained == ["features"]


def test_a_training_run_reads_the_cache(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_config(config, ["data.feature_cache=features"])
    with pytest.raises(ConfigError, match="data.feature_cache: data/train has no features; write it with hgpt cache"):
        validate(run, 1)
    assert cache(["--config", "my_run.yaml", "--depths", "both"]) == 0
    validate(run, 1)
    for name in ("../features", "", ".hidden", "a/b"):
        run.data.feature_cache = name
        with pytest.raises(ConfigError, match="must be the plain name of a sub-folder"):
            validate(run, 1)
    assert cache(["--config", "my_run.yaml"]) == 2
    assert "features exists with both_depths True, wanted is False" in capsys.readouterr().err


def test_processes_share_out_the_folders(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("1", ["held-out"]), ("0", ["held-out", "train"])):
        monkeypatch.setenv("RANK", rank)
        assert cache(["--config", "my_run.yaml", "--dtype", "bf16"]) == 0
        assert sorted(path.parent.name for path in Path("data").glob("*/features")) == expected


def test_mistakes_are_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--preset", "tiny"], "ConfigError: no dataset folder: pass --dataset, or set data.train"),
        (["--config", "my_run.yaml", "--dataset", "nowhere"], "ConfigError: --dataset nowhere is not a folder"),
    ):
        assert cache(arguments) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(message)
