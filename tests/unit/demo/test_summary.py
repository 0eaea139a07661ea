"""What the demo prints at its end."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megatron_hgpt.demo.questions import EXAMPLE_QUESTION
from megatron_hgpt.demo.summary import example, next_steps
from megatron_hgpt.errors import DataError


def test_the_example_is_the_first_held_out_picture_of_its_series(tmp_path: Path) -> None:
    def picture(name: str, split: str, series: str, modality: str) -> dict[str, object]:
        return {"image": name, "split": split, "series": series, "facts": {"modality": modality}}

    card = [
        picture("0.png", "train", "fundus", "no"), picture("1.png", "test", "ct", "CT"),
        picture("2.png", "test", "fundus", "fundus photography"), picture("3.png", "test", "fundus", "no"),
    ]  # fmt: skip
    (tmp_path / "sources.json").write_text(json.dumps({"pictures": card}))
    assert example(tmp_path) == (tmp_path / "2.png", "fundus photography")
    (tmp_path / "sources.json").write_text(json.dumps({"pictures": card[:2]}))
    with pytest.raises(DataError, match="no held-out picture of .fundus"):
        example(tmp_path)


def test_the_next_steps_can_be_pasted(tmp_path: Path) -> None:
    lines = next_steps(tmp_path / "my run", tmp_path / "a b.png").splitlines()
    ask, draw = (shlex.split(line.split(maxsplit=1)[1]) for line in lines[:2])
    assert ask[ask.index("--question") + 1] == EXAMPLE_QUESTION
    assert Path(ask[ask.index("--checkpoint") + 1]).name == "stage3"
    assert Path(ask[ask.index("--image") + 1]).name == "a b.png"
    assert Path(draw[draw.index("--draw") + 1]).name == "drawn.png"
    assert "docs/guide.md" in lines[-1]
