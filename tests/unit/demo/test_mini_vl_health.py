"""Mini VL-Health: schema, honest answers, disjoint splits, nothing but pixels."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_hgpt.demo import mini_sources
from megatron_hgpt.demo import mini_vl_health as mini
from megatron_hgpt.demo.questions import EXAMPLE_QUESTION, OPEN_PER_ATTRIBUTE, QUESTIONS, phrase
from megatron_hgpt.demo.summary import example
from megatron_hgpt.errors import DataError

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")
pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    mini.build_mini_vl_health(folder)
    return folder


@pytest.fixture(scope="module")
def records(dataset: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: json.loads((dataset / f"{split}.json").read_text()) for split in mini.SPLITS}


@pytest.fixture(scope="module")
def card(dataset: Path) -> dict[str, Any]:
    return json.loads((dataset / "sources.json").read_text())


def _facts(card: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {picture["image"]: picture["facts"] for picture in card["pictures"]}


def test_size_is_what_the_demo_needs(card: dict[str, Any]) -> None:
    train, test = card["statistics"]["train"], card["statistics"]["test"]
    assert 90 <= train["pictures"] <= 140
    assert 0.10 <= test["pictures"] / (train["pictures"] + test["pictures"]) <= 0.20
    assert 1000 <= sum(train["comprehension"].values()) <= 2000
    assert 60 <= sum(test["comprehension"].values()) <= 120
    assert train["generation"]["reconstruction"] >= 90 and train["generation"]["super_resolution"] == 40


def test_same_seed_gives_same_bytes_and_another_does_not(dataset: Path, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    mini.build_mini_vl_health(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(dataset)
    mini.build_mini_vl_health(tmp_path / "other", seed=1)
    assert digests(tmp_path / "other")["train.json"] != digests(dataset)["train.json"]


def test_records_follow_upstream_schema(dataset: Path, records: dict[str, list[dict[str, Any]]]) -> None:
    everything = records["train"] + records["test"]
    assert len({record["id"] for record in everything}) == len(everything)
    for record in everything:
        human, gpt = record["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n") and human["value"].count("<image>") == 1
        assert (dataset / record["image"]).is_file()
        if record.get("task") == "generation":
            assert (dataset / record["target_image"]).is_file() and gpt["value"] == ""
        else:
            assert gpt["value"] and "target_image" not in record


def test_images_hold_pixels_only(dataset: Path) -> None:
    for path in sorted((dataset / "images").iterdir()):
        data, chunks, offset = path.read_bytes(), set(), 8
        while offset < len(data):
            length = int.from_bytes(data[offset : offset + 4], "big")
            chunks.add(data[offset + 4 : offset + 8])
            offset += 12 + length
        assert chunks == {b"IHDR", b"IDAT", b"IEND"}, path.name


def test_no_patient_tag_is_copied(dataset: Path, card: dict[str, Any]) -> None:
    written = "".join((dataset / name).read_text() for name in ("train.json", "test.json", "sources.json"))
    keywords = (
        "PatientName",
        "PatientID",
        "InstitutionName",
        "StudyInstanceUID",
        "ReferringPhysicianName",
        "StudyDate",
    )
    num_checked = 0
    for source in card["sources"]:
        if source["file"].endswith(".dcm"):
            tags = pydicom.dcmread(mini_sources.package_file(source["package"], source["file"]))
            values = [str(tags[keyword].value) for keyword in keywords if keyword in tags]
            num_checked += len(values)
            assert not [value for value in values if len(value) > 3 and value in written]
    assert num_checked > 20  # the files do carry such tags


def _asked(question: str, facts: dict[str, dict[str, str]]) -> list[tuple[str, str | None]]:
    """(attribute, value named in a closed question or None) that a question can come from."""
    text = question.removeprefix("<image>\n")
    values = {(name, value) for picture in facts.values() for name, value in picture.items()}
    closed = [
        (name, value)
        for name, value in values
        if text in [w.format(phrase(name, value)) for w in _wordings(name, "closed")]
    ]
    return closed + [(name, None) for name in QUESTIONS if text in _wordings(name, "open")]


def _wordings(name: str, kind: str) -> list[str]:
    return [*getattr(QUESTIONS[name], kind), *getattr(QUESTIONS[name], f"held_out_{kind}")]


@pytest.fixture(scope="module")
def unseen(dataset: Path) -> list[dict[str, Any]]:
    return json.loads((dataset / "wordings.json").read_text())


def test_answers_are_the_facts_of_the_picture(
    records: dict[str, list[dict[str, Any]]], unseen: list[dict[str, Any]], card: dict[str, Any]
) -> None:
    facts, meaning = _facts(card), {}
    for record in records["train"] + records["test"] + unseen:
        question, answer = (turn["value"] for turn in record["conversations"])
        if "answer_type" in record:
            if question not in meaning:
                (meaning[question],) = _asked(question, facts)  # unambiguous
            attribute, value = meaning[question]
            fact = facts[record["image"]][attribute]
            assert answer == (fact if value is None else "yes" if value == fact else "no"), record
            assert record["question_type"] == (attribute if value is None else f"{attribute}, yes or no")


def test_rare_facts_are_asked_for(records: dict[str, list[dict[str, Any]]]) -> None:
    answers = {
        record["conversations"][1]["value"] for record in records["train"] if record.get("answer_type") == "open"
    }
    assert {"functional", "anatomical", "spin echo", "time of flight", "echo planar", "bone scan"} <= answers


def test_head_is_never_denied_of_a_brain(records: dict[str, list[dict[str, Any]]], card: dict[str, Any]) -> None:
    facts = _facts(card)
    for record in records["train"] + records["test"]:
        if record["conversations"][1]["value"] == "no" and facts[record["image"]].get("body_part") in ("brain", "head"):
            question = record["conversations"][0]["value"]
            assert "the head" not in question and "the brain" not in question


def test_closed_answers_are_balanced_and_not_readable_from_the_question(
    records: dict[str, list[dict[str, Any]]],
) -> None:
    closed = [record for record in records["train"] if record.get("answer_type") == "closed"]
    answers = Counter(record["conversations"][1]["value"] for record in closed)
    assert answers["yes"] == answers["no"]
    by_question: dict[str, Counter[str]] = {}
    for record in closed:
        question, answer = (turn["value"] for turn in record["conversations"])
        by_question.setdefault(question, Counter())[answer] += 1
    guessed = sum(max(counter.values()) for counter in by_question.values() if sum(counter.values()) > 3)
    repeated = sum(sum(counter.values()) for counter in by_question.values() if sum(counter.values()) > 3)
    assert guessed / repeated < 0.75  # 1.0 would mean that the text alone decides


def test_a_picture_is_asked_in_several_wordings_and_some_are_never_trained(
    records: dict[str, list[dict[str, Any]]], unseen: list[dict[str, Any]]
) -> None:
    asked = {record["conversations"][0]["value"] for record in records["train"]}
    assert f"<image>\n{EXAMPLE_QUESTION}" in asked
    assert not asked & {record["conversations"][0]["value"] for record in unseen}
    assert {r["image"] for r in unseen} <= {r["image"] for r in records["train"]}
    opened = [r for r in records["train"] if r.get("answer_type") == "open"]
    per_attribute = Counter((r["image"], r["question_type"]) for r in opened)
    common = ("modality", "plane", "body_part")
    for (_, attribute), number in per_attribute.items():
        assert number == (OPEN_PER_ATTRIBUTE if attribute in common else len(QUESTIONS[attribute].open)), attribute
    test = {r["conversations"][0]["value"] for r in records["test"] if r.get("answer_type") == "open"}
    assert test <= asked  # so that a held-out picture tests the picture, not the wording


def test_one_answer_per_image_and_question(records: dict[str, list[dict[str, Any]]]) -> None:
    keys = Counter(
        (record["image"], record["conversations"][0]["value"]) for split in mini.SPLITS for record in records[split]
    )
    assert max(keys.values()) == 1


def test_pictures_differ_at_the_size_the_tower_sees(dataset: Path, card: dict[str, Any]) -> None:
    pixels = np.stack(
        [
            np.asarray(Image.open(dataset / picture["image"]).resize((64, 64)), dtype=np.float32).ravel()
            for picture in card["pictures"]
        ]
    )
    assert pixels.std(axis=1).min() > 8  # nothing blank
    squares = (pixels**2).sum(axis=1)
    distance = (squares[:, None] + squares[None] - 2 * pixels @ pixels.T) / pixels.shape[1]
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 25  # root mean square of 5 grey levels; two fundus tiles are the closest, at 8.6


def test_no_picture_is_in_both_splits(records: dict[str, list[dict[str, Any]]], card: dict[str, Any]) -> None:
    files = {
        split: {r[key].replace("_x4", "") for r in records[split] for key in ("image", "target_image") if key in r}
        for split in mini.SPLITS
    }
    assert files["train"] and files["test"] and not files["train"] & files["test"]
    slices = [p for p in card["pictures"] if "slice" in p["region"] and p["series"] != "functional/axial"]
    for held_out in (p for p in slices if p["split"] == "test"):
        near = [
            p["position"]
            for p in slices
            if p["series"] == held_out["series"] and p["split"] == "train"
            and abs(p["position"] - held_out["position"]) <= 2
        ]  # fmt: skip
        assert not near, held_out["image"]


def _slice(position: int, value: int) -> mini_sources.Picture:
    source = mini_sources.Source(package="p", file="f", licence="l", description="d", evidence="e")
    return mini_sources.Picture(
        image=Image.new("RGB", (64, 64), (value,) * 3), source=source, series="v/axial", position=position,
        facts={"plane": "axial"}, region=f"axial slice {position} in RAS order",
    )  # fmt: skip


def test_leaking_splits_are_refused() -> None:
    mini.check_splits([_slice(0, 1), _slice(3, 2)], ["train", "test"])
    with pytest.raises(DataError, match="slices 0 and 2"):
        mini.check_splits([_slice(0, 1), _slice(2, 2)], ["train", "test"])
    with pytest.raises(DataError, match="are equal"):
        mini.check_splits([_slice(0, 1), _slice(9, 1)], ["train", "test"])


def test_super_resolution_input_is_a_quarter_of_real_detail(
    dataset: Path, records: dict[str, list[dict[str, Any]]], card: dict[str, Any]
) -> None:
    enlarged = {picture["image"]: picture["enlarged"] for picture in card["pictures"]}
    found = [record for record in records["train"] if record.get("kind") == "super_resolution"]
    for record in found:
        low, high = Image.open(dataset / record["image"]), Image.open(dataset / record["target_image"])
        assert low.size == (round(high.width / 4), round(high.height / 4))
        assert not enlarged[record["target_image"]]


def test_conversion_pairs_show_the_same_place(card: dict[str, Any], records: dict[str, list[dict[str, Any]]]) -> None:
    place = {picture["image"]: (picture["series"], picture["position"]) for picture in card["pictures"]}
    affines = {
        name: nibabel.as_closest_canonical(
            nibabel.load(mini_sources.package_file("nibabel", f"tests/data/{name}.nii"))
        ).affine
        for name in ("anatomical", "functional")
    }
    pairs = [r for split in mini.SPLITS for r in records[split] if "_to_" in r.get("kind", "")]
    assert len(pairs) == 6
    for record in pairs:
        heights = []
        for key in ("image", "target_image"):
            series, index = place[record[key]]
            affine = affines[series.split("/")[0]]
            assert np.allclose(affine[2, :2], 0)  # axial slices are level
            heights.append(affine[2, 2] * index + affine[2, 3])
        assert heights[0] == heights[1]


def test_the_readme_asks_what_the_demo_asks(dataset: Path) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    image, _ = example(dataset)
    assert f"vl_health_mini/images/{image.name} " in readme
    assert readme.split('--question "')[1].startswith(EXAMPLE_QUESTION), "README's first question"


def test_missing_package_and_file_are_named() -> None:
    with pytest.raises(DataError, match="pip install"):
        mini_sources.package_file("no_such_package_of_pictures", "a.dcm")
    with pytest.raises(DataError, match=r"no_such\.dcm"):
        mini_sources.package_file("pydicom", "data/no_such.dcm")
