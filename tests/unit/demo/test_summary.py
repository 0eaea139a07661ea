"""What the demo prints at its end."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from megatron_hgpt.demo.questions import EXAMPLE_QUESTION
from megatron_hgpt.demo.summary import example, next_steps, results_table
from megatron_hgpt.errors import DataError
from megatron_hgpt.evaluation.results import ImageResult, VQAResult
from megatron_hgpt.evaluation.store import save_results


def _answer(given: str, baseline: str = "CT") -> VQAResult:
    return VQAResult(sample_id="a", question="?", image=None, expected="MRI", given=given, baseline=baseline)


def test_the_table_has_the_baseline_beside_each_figure(tmp_path: Path) -> None:
    grey, black = (Image.new("RGB", (16, 16), (value,) * 3) for value in (10, 0))
    drawn = ImageResult(sample_id="d", instruction="?", input=None, target=grey, round_trip=grey, output=black)
    closed = VQAResult(sample_id="b", question="?", image=None, expected="yes", given="Yes", baseline="no")
    vqa = [_answer("MRI"), _answer("CT", "MRI"), closed]
    save_results(tmp_path / "train", split="train", vqa=vqa, images=[drawn])
    save_results(tmp_path / "words", split="words", vqa=[_answer("MRI"), _answer("CT", "")], images=[])
    lines = results_table({"train": tmp_path / "train", "held-out wordings": tmp_path / "words"}).splitlines()
    cells = [re.split(r"  +", line.strip()) for line in lines[:3]]
    head = "questions,right,baseline,open,baseline,yes/no,baseline,pictures,PSNR,VQ limit"
    assert cells[0] == head.split(",")
    assert cells[1] == ["train", "3", "66.7%", "33.3%", "50.0%", "50.0%", "100.0%", "0.0%", "1", "28.1 dB", "100.0 dB"]
    assert cells[2] == ["held-out wordings", "2", "50.0%", "–", "50.0%", "–", "–", "–", "–", "–", "–"]
    assert len({len(line) for line in lines[:2]}) == 1


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
