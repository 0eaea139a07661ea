from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_hgpt.errors import DataError
from megatron_hgpt.evaluation.store import ImageResult, VQAResult, save_results
from megatron_hgpt.report.charts import Series, line_chart
from megatron_hgpt.report.page import MAX_DRAWINGS, MAX_QUESTIONS, write_report

_VOID = {"meta", "img", "br", "line", "polyline"}
_ATTACK = '"><script>alert(1)</script>'


class _Page(HTMLParser):
    """Collects what the tests ask about, and checks that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._stack: list[str] = []
        self.feed(html)
        self.close()
        assert self._stack == [], f"never closed: {self._stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _run(folder: Path, stage: str, tasks: tuple[str, ...]) -> Path:
    folder.mkdir()
    records = [
        {"step": s, "stage": stage, "loss": 5 / s, "lr": 1e-4, "adapter_lr": 1e-5, "grad_norm": 1.0}
        | {f"loss_{task}": 5 / s for task in tasks}
        for s in range(1, 41)
    ]
    records[7]["loss"] = None  # a step whose loss was not finite
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    summary = {"stage": stage, "steps": 40, "first_loss": 5.0, "last_loss": 0.125, "wall_s": 75.0, "tokens_per_s": 999}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "resolved_config.yaml").write_text(f"name: {stage}\nnote: '{_ATTACK}'\n")
    return folder


def _picture(value: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8))


@pytest.fixture
def page(tmp_path: Path) -> _Page:
    runs = [_run(tmp_path / "s1", "stage1_comprehension", ("comprehension",)), _run(tmp_path / "s2", "stage2", ())]
    runs.append(_run(tmp_path / "s3", "stage3_joint", ("comprehension", "generation")))
    vqa = [
        VQAResult(
            sample_id=str(i), question=f"<image>\nQuestion {i}?", image=_picture(9, 300), expected="ct", given="CT."
        )
        for i in range(MAX_QUESTIONS + 9)
    ]
    vqa.append(VQAResult(sample_id=_ATTACK, question=_ATTACK, image=None, expected=_ATTACK, given="<script>alert(2)"))
    images = [
        ImageResult(
            sample_id=_ATTACK,
            instruction=f"<image>\nDraw {i} {_ATTACK}",
            input=None if i == 0 else _picture(100),
            target=_picture(100),
            round_trip=_picture(105),
            output=_picture(110),
            kind="reconstruction",
        )
        for i in range(MAX_DRAWINGS + 3)
    ]
    for split in ("train", "held-out"):
        save_results(tmp_path / split, vqa=vqa, images=images, split=split)
    write_report(
        tmp_path / "out" / "report.html",
        runs=runs,
        evaluations={"train": tmp_path / "train", "held-out": tmp_path / "held-out"},
        title=f"Report {_ATTACK}",
        notes={"Device": f"2 cores {_ATTACK}"},
    )
    return _Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))


def test_nothing_is_fetched_and_nothing_runs(page: _Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}, tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster", "style"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("#", "data:image/png;base64,")), f"{tag} {name}={value[:60]}"
    assert "url(" not in page.text and "@import" not in page.text


def test_texts_are_escaped_but_shown(page: _Page) -> None:
    # Title element, heading, question, expected, 2 x 12 instructions, note, three configurations …
    assert page.text.count(_ATTACK) >= 10
    assert "<script>alert(2)" in page.text
    assert any(_ATTACK in (attributes.get("alt") or "") for attributes in page.all("img"))


def test_sections_and_headline(page: _Page) -> None:
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == ["training", "answers", "images", "setup"]
    assert {a["href"] for a in page.all("a")} == {f"#{name}" for name in sections}
    share = f"{(MAX_QUESTIONS + 9) / (MAX_QUESTIONS + 10):.1%}"
    psnr, gap = 20 * math.log10(255 / 10), 20 * math.log10(2)
    for text in (share, f"{psnr:.2f} dB", f"{gap:.2f} dB below the VQ round trip", "3 min 45 s", "3 stages, 120 steps"):
        assert text in page.text
    assert "held-out" in page.text and "name: stage3_joint" in page.text


def test_answers_are_limited_with_wrong_ones_first(page: _Page) -> None:
    marks = [a["class"] for a in page.all("li") if a.get("class") in ("right", "wrong")]
    assert len(marks) == 2 * MAX_QUESTIONS
    assert marks[:2] == ["wrong", "right"] and marks.count("wrong") == 2
    total = MAX_QUESTIONS + 10
    assert f"{total - 1} right, 1 wrong. Shown: {MAX_QUESTIONS} of {total}, wrong ones first." in page.text


def test_images_decode_and_have_alternative_texts(page: _Page) -> None:
    images = page.all("img")
    # Per split: the questions that have an image, four pictures per drawing but one without input.
    assert len(images) == 2 * (MAX_QUESTIONS - 1 + 4 * MAX_DRAWINGS - 1)
    for attributes in images:
        assert attributes["alt"]
        with Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",", 1)[1]))) as image:
            assert max(image.size) <= 144
    assert f"{MAX_DRAWINGS} of {MAX_DRAWINGS + 3}, evenly spaced." in page.text


def test_charts_are_described(page: _Page) -> None:
    labels = [a["aria-label"] for a in page.all("svg")]
    assert len(labels) == 6  # loss and learning rate of three stages
    assert labels[2] == ("stage3_joint, loss over 40 steps: comprehension from 5 to 0.125; generation from 5 to 0.125")
    for points in (a["points"] for a in page.all("polyline")):
        assert "nan" not in points and "inf" not in points
        for x, y in re.findall(r"([-\d.]+),([-\d.]+)", points):
            assert 0 <= float(x) <= 420 and 0 <= float(y) <= 230, "inside the drawing"


def test_held_out_losses_stand_beside_the_training_curve(tmp_path: Path) -> None:
    run = _run(tmp_path / "s3", "stage3_joint", ("comprehension", "generation"))
    old = _run(tmp_path / "s2", "stage2", ("generation",))  # of a version without validation
    validations = [
        {"step": 20, "loss": 3.0, "loss_comprehension": 2.0, "loss_generation": 4.0},
        {"step": 40, "loss": 2.5, "loss_comprehension": None, "loss_generation": 3.5},  # not finite
    ]
    (run / "validation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in validations))
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"first_validation_loss": 3.125, "last_validation_loss": None, "best_validation_loss": 2.625}
    (run / "summary.json").write_text(json.dumps(summary))
    write_report(tmp_path / "r.html", runs=[old, run], evaluations={}, title="t")
    html = (tmp_path / "r.html").read_text()
    page = _Page(html)
    circles = [attributes["class"] for attributes in page.all("circle")]
    assert circles == ["comprehension held-out", "generation held-out", "generation held-out"]
    assert "comprehension, held out from 2 to 2; generation, held out from 4 to 3.5" in page.all("svg")[1]["aria-label"]
    assert "held out" not in page.all("svg")[0]["aria-label"]
    header = re.findall(r"<th scope=\"col\">(.*?)</th>", html)
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", html)
    columns = [header.index(f"{name} validation") - 1 for name in ("First", "Last", "Best")]
    cells = {name: re.findall(r"<td>(.*?)</td>", text) for name, text in rows}
    assert [cells["stage3_joint"][i] for i in columns] == ["3.125", "–", "2.625"]
    assert [cells["stage2"][i] for i in columns] == ["–", "–", "–"]


def test_without_validation_the_table_has_no_column_for_it(page: _Page) -> None:
    assert "validation" not in page.text and "held out" not in page.text


def test_chart_coordinates_by_hand() -> None:
    series = Series(label="a", points=[(0, 0.0), (50, 2.0), (100, 4.0)], css_class="all")
    svg = line_chart([series], title="t", y_label="loss")
    # Plot area: x 52 … 406, y 196 (bottom) … 12 (top); ticks end at 4.
    assert 'points="52.0,196.0 229.0,104.0 406.0,12.0"' in svg
    assert line_chart([Series(label="a", points=[], css_class="all")], title="t", y_label="loss") == ""


def test_log_scale_of_a_wide_range() -> None:
    series = Series(label="a", points=[(0, 10.0), (10, 1.0), (20, 0.1)], css_class="all")
    svg = line_chart([series], title="t", y_label="loss")
    assert "(log scale)" in svg and 'points="52.0,12.0 229.0,104.0 406.0,196.0"' in svg
    for values in ([3.0], [0.0, 0.0], [-2.0, 5.0], [1e-12, 1e12]):
        points = [(float(i), v) for i, v in enumerate(values)]
        assert "nan" not in line_chart([Series(label="a", points=points, css_class="all")], title="t", y_label="y")


def test_a_page_without_results(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", runs=[], evaluations={}, title="Empty")
    text = _Page((tmp_path / "r.html").read_text()).text
    for sentence in ("No training run was given.", "No questions were evaluated.", "No images were drawn."):
        assert sentence in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "resolved_config.yaml"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    run = _run(tmp_path / "s1", "stage2", ())
    (run / name).unlink()
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(tmp_path / "r.html", runs=[run], evaluations={}, title="t")
    assert not (tmp_path / "r.html").exists()


def test_summary_of_another_shape_is_refused(tmp_path: Path) -> None:
    run = _run(tmp_path / "s1", "stage2", ())
    (run / "summary.json").write_text('{"stage": "stage2"}')
    with pytest.raises(DataError, match="without first_loss, last_loss, steps, tokens_per_s, wall_s"):
        write_report(tmp_path / "r.html", runs=[run], evaluations={}, title="t")


def test_command_line(tmp_path: Path) -> None:
    tool = Path(__file__).parents[3] / "tools" / "make_report.py"
    run = _run(tmp_path / "s1", "stage2", ("generation",))
    save_results(tmp_path / "ev", vqa=[], images=[], split="train")
    out = tmp_path / "r.html"

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(tool), "--out", str(out), *arguments], capture_output=True, text=True
        )

    result = call("--run", str(run), "--evaluation", f"train={tmp_path / 'ev'}", "--note", "Command=a=b")
    assert result.returncode == 0, result.stderr
    assert "a=b" in out.read_text() and "wrote" in result.stdout
    result = call("--run", str(tmp_path / "nowhere"))
    assert result.returncode == 2 and result.stderr.startswith("DataError: ") and "nowhere" in result.stderr
    assert "not of the form NAME=VALUE" in call("--note", "x").stderr
