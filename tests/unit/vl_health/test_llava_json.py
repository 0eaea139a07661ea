"""The JSON schema of VL-Health and our generation records; each malformed record has its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hgpt.errors import DataError, SkipSample
from megatron_hgpt.samples import Sample, Task
from megatron_hgpt.vl_health.llava_json import parse_record, read_records

ANSWER = "<start_index><idx_3><idx_0><idx_15><idx_7><end_index>"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("root/a.png", "root/sub/b.png", "secret.png", "root2/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path / "root"


def _record(*texts: str, roles: tuple[str, ...] = ("human", "gpt"), **fields: Any) -> dict[str, Any]:
    turns = [{"from": roles[i % len(roles)], "value": text} for i, text in enumerate(texts)]
    return {"id": 7, "conversations": turns, **fields}


def _parse(record: Any, root: Path) -> Sample:
    return parse_record(record, image_root=root, num_codes=16, num_indices=4, default_id="d", source="slake")


def test_comprehension_record(root: Path) -> None:
    record = _record("<image><image>\nWhat?", "CT", "Sure?", "yes", image=["a.png", "sub/b.png"])
    sample = _parse(record, root)
    assert (sample.sample_id, sample.task, sample.source) == ("7", Task.COMPREHENSION, "slake")
    assert [turn.role for turn in sample.turns] == ["user", "assistant"] * 2
    assert sample.turns[0].text == "<image><image>\nWhat?"
    assert sample.images == [root / "a.png", root / "sub" / "b.png"]
    without_id = {"conversations": record["conversations"], "images": [b"1", b"2"], "source": "vqa_rad"}
    assert (_parse(without_id, root).sample_id, _parse(without_id, root).images) == ("d", [b"1", b"2"])
    assert _parse(without_id, root).source == "vqa_rad"
    assert _parse(_record("What?", "CT"), root).images == []


@pytest.mark.parametrize(
    "record",
    [
        _record("Draw.", ANSWER),
        _record("Draw.", " <start_index> <idx_3> <idx_0><idx_15>\n<idx_7><end_index>\n"),
        _record("Draw.", "", target_indices=[3, 0, 15, 7]),
        _record("Draw.", ANSWER, target_indices=[3, 0, 15, 7], task="generation", target_image="absent.png"),
    ],
)
def test_generation_record_with_indices(record: dict[str, Any], root: Path) -> None:
    sample = _parse(record, root)
    assert sample.task is Task.GENERATION
    assert sample.target_indices == [3, 0, 15, 7]
    assert sample.target_image is None
    assert sample.turns[-1].text.strip() == ""


def test_evaluation_reads_records_of_any_codebook(root: Path) -> None:
    sample = parse_record(_record("Draw.", ANSWER, answer_type="open"), root)
    assert sample.target_indices == [3, 0, 15, 7]
    assert sample.metadata == {"answer_type": "open"}
    with pytest.raises(SkipSample, match="bad_indices"):
        parse_record(_record("Draw.", "", target_indices=[-1]), root)


def test_generation_record_with_image_and_text(root: Path) -> None:
    sample = _parse(_record("<image>\nConvert.", "", image="a.png", target_image="sub/b.png"), root)
    assert (sample.task, sample.target_image, sample.target_indices) == (Task.GENERATION, root / "sub" / "b.png", None)
    assert _parse(_record("Draw.", f"Here it is: {ANSWER}"), root).turns[-1].text == "Here it is: "


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "malformed_record"),
        ({"id": 1}, "malformed_record"),
        ({"conversations": [{"from": "human"}]}, "malformed_record"),
        ({"conversations": [["human", "x"]]}, "malformed_record"),
        (_record("a", "b", task="vqa"), "malformed_record"),
        (_record("a", ANSWER, task="comprehension"), "malformed_record"),
        (_record("<image>", "b", image={"path": "a.png"}), "malformed_record"),
        (_record("<image>", "b", image="a\0.png"), "malformed_record"),
        (_record("a", "b", roles=("system", "gpt")), "bad_role_order"),
        (_record("a", "b", roles=("gpt", "human")), "bad_role_order"),
        (_record("a", "b", "c"), "bad_role_order"),
        (_record("a", roles=("human",)), "no_assistant_turn"),
        (_record("a", " \n"), "empty_answer"),
        (_record("a", "", "b", "c"), "empty_answer"),
        (_record("a", "", "b", "", target_indices=[1, 2, 3, 4]), "empty_answer"),
        (_record("What?", "b", image="a.png"), "image_count_mismatch"),
        (_record("<image><image>", "b", image="a.png"), "image_count_mismatch"),
        (_record("<image>", "b"), "image_count_mismatch"),
        (_record("What?", "<image>", image="a.png"), "image_count_mismatch"),
        (_record("<image>", "b", image="absent.png"), "missing_image"),
        (_record("<image>", "b", image="sub"), "missing_image"),
        (_record("<image>", "b", image="../secret.png"), "path_escape"),
        (_record("<image>", "b", image="sub/../../secret.png"), "path_escape"),
        (_record("<image>", "b", image="../root2/c.png"), "path_escape"),
        (_record("<image>", "b", image="/etc/hostname"), "path_escape"),
        (_record("a", "", target_image="../secret.png"), "path_escape"),
        (_record("a", "", task="generation"), "bad_indices"),
        (_record("a", "", target_indices=[1, 2, 3]), "bad_indices"),
        (_record("a", "", target_indices=[1, 2, 3, 16]), "bad_indices"),
        (_record("a", "", target_indices=[1, 2, 3, -1]), "bad_indices"),
        (_record("a", "", target_indices=[1, 2, 3, True]), "bad_indices"),
        (_record("a", "", target_indices="1 2 3 4"), "bad_indices"),
        (_record("a", ANSWER, target_indices=[1, 2, 3, 4]), "bad_indices"),
        (_record("a", ANSWER.replace("<end_index>", "")), "bad_indices"),
        (_record("a", f"{ANSWER} and more"), "bad_indices"),
        (_record("a", ANSWER * 2), "bad_indices"),
        (_record("a", "<idx_3>"), "bad_indices"),
        (_record("a", ANSWER, "b", "c"), "bad_indices"),
    ],
)
def test_reasons(record: Any, reason: str, root: Path) -> None:
    with pytest.raises(SkipSample) as caught:
        _parse(record, root)
    assert caught.value.reason == reason
    assert str(root) not in caught.value.detail


def test_read_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1}, {"id": 2}]))
    (tmp_path / "b.jsonl").write_text('{"id": 1}\n\nbroken {\n{"id": 2}\n')
    (tmp_path / "c.json").write_text('{"id": 1}')
    (tmp_path / "d.json").write_text('{"id": 1}\n{"id": 2}\n')
    assert list(read_records(tmp_path / "a.json")) == [{"id": 1}, {"id": 2}]
    assert list(read_records(tmp_path / "b.jsonl")) == [{"id": 1}, "broken {\n", {"id": 2}]
    for name, message in (("c.json", "holds a dict"), ("d.json", "needs the ending .jsonl"), ("e.json", "not exist")):
        with pytest.raises(DataError, match=message):
            list(read_records(tmp_path / name))


def test_other_fields_are_metadata_and_checks_are_optional(root: Path) -> None:
    record = _record("Draw.", "", target_indices=[999], kind="ct_to_mri", question_type="modality", source="ixi")
    sample = parse_record(record, root)  # as evaluation does: the codebook is not known there
    assert sample.metadata == {"kind": "ct_to_mri", "question_type": "modality"}
    assert (sample.target_indices, sample.source) == ([999], "ixi")
    with pytest.raises(SkipSample, match="an index is outside the codebook .*-1"):
        parse_record({**record, "target_indices": [-1]}, root)
