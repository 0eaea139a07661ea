"""``hgpt report``: what it says when it has written the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_hgpt.cli import main
from megatron_hgpt.evaluation.store import VQAResult, save_results


def test_the_size_of_a_small_page_is_not_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = VQAResult(sample_id="a", question="?", image=None, expected="yes", given="yes")
    save_results(tmp_path / "evaluation", split="x", vqa=[answer], images=[])
    page = tmp_path / "page.html"
    assert main(["report", "--out", str(page), "--evaluation", f"x={tmp_path / 'evaluation'}"]) == 0
    assert re.fullmatch(rf"wrote {page} \([1-9]\d* kB\)\n", capsys.readouterr().out)
