from __future__ import annotations

import pytest

from megatron_hgpt.evaluation.results import VQAResult
from megatron_hgpt.evaluation.vqa import (
    is_closed,
    is_closed_correct,
    is_exact_match,
    majority_answers,
    normalise_answer,
    question_type,
    recall_and_f1,
    summarise_vqa,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  Yes. ", "yes"),
        ("The left   LUNG", "left lung"),
        ("T1-weighted MRI", "t1 weighted mri"),
        ("Barrett’s esophagus", "barretts esophagus"),
        ("3.5 cm", "3.5 cm"),
        ("1,024", "1,024"),
        ("about 3.", "about 3"),
        ("-5", "-5"),
        ("2-5 mm", "2 5 mm"),
        ("50%", "50%"),
        ("A", "a"),
        ("an", "an"),
        ("<b>", "<b>"),
        ("ＭＲＩ", "mri"),
        ("", ""),
        ("...", ""),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal
    assert normalise_answer(normal) == normal, "normalising twice changes nothing"


def test_exact_match_and_closed_questions() -> None:
    assert is_exact_match("chest x-ray", "A chest X ray.")
    assert not is_exact_match("left lung", "right lung")
    assert not is_exact_match("A", "B"), "an option letter is not an article that vanishes"
    assert is_closed("Yes.") and is_closed("no") and not is_closed("not sure")
    assert is_closed_correct("yes", "Yes, there is.") and not is_closed_correct("no", "Yes, no doubt")
    assert not is_closed_correct("yes", "") and not is_closed_correct("no", "nodule")


def test_recall_and_f1_by_hand() -> None:
    # reference {left, lower, lobe}, answer {left, lobe, of, lung}: 2 in common.
    recall, f1 = recall_and_f1("left lower lobe", "the left lobe of the lung")
    assert recall == pytest.approx(2 / 3) and f1 == pytest.approx(2 * 2 / (3 + 4))
    assert recall_and_f1("mass mass", "mass")[0] == 0.5, "words count with multiplicity"
    assert recall_and_f1("", "") == (1.0, 1.0) and recall_and_f1("x", "") == (0.0, 0.0) == recall_and_f1("", "x")


def _result(question: str, expected: str, given: str, question_type: str = "") -> VQAResult:
    return VQAResult(
        sample_id="s", question=question, image=None, expected=expected, given=given, question_type=question_type
    )


def test_summary_by_hand() -> None:
    summary = summarise_vqa(
        [
            _result("<image>\nIs this a CT?", "yes", "Yes"),
            _result("Is it normal?", "no", "No, it is not."),
            _result("What modality?", "MRI", "mri", "modality"),
            _result("What organ?", "left lung", "lung", "organ"),
        ]
    )
    assert summary == {
        "num_questions": 4,
        "num_closed": 2,
        "num_open": 2,
        "exact_match": 0.5,
        "baseline_exact_match": None,
        "closed_accuracy": 1.0,
        "open_exact_match": 0.5,
        "open_recall": 0.75,
        "open_token_f1": pytest.approx((1 + 2 / 3) / 2),
        "open_baseline": None,
        "closed_baseline": None,
        "by_question_type": {
            "is": {"num_questions": 2, "exact_match": 0.5, "baseline_exact_match": None},
            "modality": {"num_questions": 1, "exact_match": 1.0, "baseline_exact_match": None},
            "organ": {"num_questions": 1, "exact_match": 0.0, "baseline_exact_match": None},
        },
    }


def test_no_questions_give_no_figures() -> None:
    summary = summarise_vqa([])
    assert summary["num_questions"] == 0 and summary["exact_match"] is None and summary["by_question_type"] == {}
    assert question_type("<image>", "") == "(empty)"
    assert summary["baseline_exact_match"] is None


def test_the_baseline_is_the_most_frequent_training_answer_of_the_type() -> None:
    baseline = majority_answers([("plane", "axial"), ("plane", "coronal"), ("plane", "axial"), ("is", "no")])
    assert baseline == {"plane": "axial", "is": "no"}
    assert majority_answers([("plane", "coronal"), ("plane", "axial")]) == {"plane": "coronal"}, "the first of equals"
    results = [
        _result("Which plane?", "Axial.", "coronal", "plane"),
        _result("Which plane?", "coronal", "coronal", "plane"),
        _result("Is it?", "yes", "yes"),
    ]
    for result in results:
        result.baseline = baseline[question_type(result.question, result.question_type)]
    summary = summarise_vqa(results)
    assert summary["exact_match"] == pytest.approx(2 / 3) and summary["baseline_exact_match"] == pytest.approx(1 / 3)
    assert summary["by_question_type"]["plane"]["baseline_exact_match"] == 0.5
    assert (summary["open_baseline"], summary["closed_baseline"]) == (0.5, 0.0)
    results[0].baseline = ""
    assert summarise_vqa(results)["baseline_exact_match"] is None, "a share of some questions compares with nothing"
