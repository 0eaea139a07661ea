"""The figures of evaluated splits as a user reads them."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from megatron_hgpt.evaluation.results import ImageResult, VQAResult
from megatron_hgpt.evaluation.store import save_results
from megatron_hgpt.evaluation.table import results_table


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
