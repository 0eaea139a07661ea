"""``hgpt evaluate``: the names of splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hgpt.cli.evaluate import read_splits
from megatron_hgpt.errors import ConfigError


def test_a_split_is_named_or_has_its_files_name(tmp_path: Path) -> None:
    assert read_splits(["held-out=data/test.json", "data/train.jsonl", "a=b=c.json"]) == {
        "held-out": Path("data/test.json"),
        "train": Path("data/train.jsonl"),
        "a": Path("b=c.json"),
    }
    (tmp_path / "lr=1.json").write_text("[]")
    assert read_splits([f"{tmp_path / 'lr=1.json'}"]) == {"lr=1": tmp_path / "lr=1.json"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a/test.json", "b/test.json"], "a/test.json and b/test.json would both be split 'test'; write NAME=FILE"),
        (["x=a.json", "x=b.json"], "would both be split 'x'"),
        (["=a.json"], "'' is no plain name"),
        (["..=a.json"], r"'\.\.' is no plain name"),
        (["../x=a.json"], r"'\.\./x' is no plain name of a split; write held-out=FILE"),
    ],
)
def test_other_names_are_refused(data: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_splits(data)
