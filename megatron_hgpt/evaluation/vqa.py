"""Scoring of visual question answering. The rules, in the order in which they apply:

Normalisation (reference and given answer alike)
    1. Unicode NFKC, lower case.
    2. Apostrophes are removed ("barrett's" -> "barretts"). A point or comma between two digits stays ("3.5"), a minus
       before a number that starts a word stays ("-5"), "%" and other symbols stay; every other punctuation mark
       becomes a space ("T1-weighted" -> "t1 weighted").
    3. The words "a", "an" and "the" are dropped, unless nothing would be left (the option "A").
    4. Runs of white space become one space; none at the ends.

Scores
    exact match      the normalised strings are equal; an empty reference matches an empty answer only.
    closed question  its normalised reference is "yes" or "no"; every other question is open.
    closed accuracy  the first word of the given answer is the reference ("yes, there is" counts for "yes").
    open recall      share of the reference's words (with multiplicity) that the given answer holds.
    open token F1    harmonic mean of that recall and the share of the given answer's words in the reference.
    baseline         exact match of whoever never looks and gives each question the most frequent training answer to
                     questions of its type.

Every figure is a plain mean over questions, between 0 and 1, and None where there is no question of that kind.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_hgpt.evaluation.results import VQAResult

_ARTICLES = frozenset({"a", "an", "the"})
_APOSTROPHES = re.compile("['`\u2018\u2019]")
_NUMBER_PUNCTUATION = re.compile(r"(?<=\d)[.,](?=\d)|(?<!\S)-(?=\d)")


def normalise_answer(text: str) -> str:
    """`text` after the normalisation rules of this module."""
    text = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", text).lower())
    kept = {match.start() for match in _NUMBER_PUNCTUATION.finditer(text)}
    characters = [
        " " if index not in kept and char != "%" and unicodedata.category(char).startswith("P") else char
        for index, char in enumerate(text)
    ]
    words = "".join(characters).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def is_exact_match(expected: str, given: str) -> bool:
    """Whether both answers are the same after normalisation."""
    return normalise_answer(expected) == normalise_answer(given)


def is_closed(expected: str) -> bool:
    """Whether the question asks for yes or no."""
    return normalise_answer(expected) in ("yes", "no")


def is_closed_correct(expected: str, given: str) -> bool:
    """Whether the given answer starts with the reference word of a closed question."""
    return normalise_answer(given).split()[:1] == [normalise_answer(expected)]


def recall_and_f1(expected: str, given: str) -> tuple[float, float]:
    """Word recall and word F1 of one answer; both 1 for two empty answers, 0 if only one is empty."""
    reference, answer = Counter(normalise_answer(expected).split()), Counter(normalise_answer(given).split())
    if not reference or not answer:
        same = float(reference == answer)
        return same, same
    common = (reference & answer).total()
    return common / reference.total(), 2 * common / (reference.total() + answer.total())


def question_type(question: str, stated: str) -> str:
    """The type the data set states, else the first word of the question ("what", "is", …)."""
    words = normalise_answer(question.replace("<image>", " ")).split()
    return stated or (words[0] if words else "(empty)")


def majority_answers(asked: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The most frequent answer of each question type, from (type, answer) pairs; the first of equals."""
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, answer in asked:
        by_type[kind][answer] += 1
    return {kind: answers.most_common(1)[0][0] for kind, answers in by_type.items()}


def summarise_vqa(results: Sequence[VQAResult]) -> dict[str, Any]:
    """All scores of this module over `results`; JSON-safe.

    Returns:
        num_questions, num_closed, num_open, exact_match, closed_accuracy, open_exact_match, open_recall,
        open_token_f1; of the baseline baseline_exact_match, open_baseline and closed_baseline (exact match over all,
        open and closed questions; None unless every one has a baseline answer); and by_question_type: type ->
        {num_questions, exact_match, baseline_exact_match}.
    """
    closed = [r for r in results if is_closed(r.expected)]
    opened = [r for r in results if not is_closed(r.expected)]
    words = [recall_and_f1(r.expected, r.given) for r in opened]
    by_type: dict[str, list[VQAResult]] = defaultdict(list)
    for result in results:
        by_type[question_type(result.question, result.question_type)].append(result)
    return {
        "num_questions": len(results),
        "num_closed": len(closed),
        "num_open": len(opened),
        **_against_baseline(results),
        "closed_accuracy": _mean([is_closed_correct(r.expected, r.given) for r in closed]),
        "open_exact_match": _mean([is_exact_match(r.expected, r.given) for r in opened]),
        "open_recall": _mean([recall for recall, _ in words]),
        "open_token_f1": _mean([f1 for _, f1 in words]),
        "open_baseline": _against_baseline(opened)["baseline_exact_match"],
        "closed_baseline": _against_baseline(closed)["baseline_exact_match"],
        "by_question_type": {
            name: {"num_questions": len(its), **_against_baseline(its)} for name, its in sorted(by_type.items())
        },
    }


def _against_baseline(results: Sequence[VQAResult]) -> dict[str, float | None]:
    guessed = [is_exact_match(r.expected, r.baseline) for r in results if r.baseline]
    return {
        "exact_match": _mean([is_exact_match(r.expected, r.given) for r in results]),
        "baseline_exact_match": _mean(guessed) if len(guessed) == len(results) else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
