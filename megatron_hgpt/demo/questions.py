"""What mini VL-Health asks about a picture: several wordings of each question, some of them never used in training.

A model that has met one wording only answers that wording. Each attribute of a training picture is asked in several of
its wordings, so that what is asked counts and not how; the held-out wordings then measure how far that carries.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hgpt.samples import IMAGE_PLACEHOLDER

OPEN_PER_ATTRIBUTE = 3
"""Wordings in which a common attribute of a training picture is asked openly; a rare one is asked in all of them."""
RARE_SHARE = 0.3
"""Share of the pictures that have an attribute, below which it is rare."""
EXAMPLE_QUESTION = "What is the modality of this image?"
"""README's first example, which the demo asks at its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wordings:
    """How one attribute is asked for; ``{}`` in a closed question is the value."""

    open: tuple[str, ...]
    closed: tuple[str, ...] = ()
    """Empty where no closed question makes sense."""
    held_out_open: tuple[str, ...]
    held_out_closed: tuple[str, ...] = ()


QUESTIONS: dict[str, Wordings] = {
    "modality": Wordings(
        open=(
            EXAMPLE_QUESTION,
            "What imaging modality is shown?",
            "Which modality was used to acquire this image?",
            "What type of medical image is this?",
            "Which imaging technique was used?",
            "What modality is this?",
            "Name the modality of this image.",
            "What is the imaging modality?",
        ),
        closed=("Was this image acquired with {}?", "Is the modality of this image {}?"),
        held_out_open=("Which imaging modality was used?", "What is the type of this image?", "Name the modality."),
        held_out_closed=("Is the imaging modality {}?",),
    ),
    "plane": Wordings(
        open=(
            "In which plane was this slice taken?",
            "What is the orientation of this slice?",
            "Which plane is shown?",
            "What plane is this?",
            "Name the plane of this slice.",
            "What is the plane of this image?",
        ),
        closed=("Is this slice in the {} plane?", "Is the orientation of this slice {}?"),
        held_out_open=("Which plane is this slice in?", "What is the orientation of this image?"),
        held_out_closed=("Is the plane of this slice {}?",),
    ),
    "body_part": Wordings(
        open=(
            "Which body part or object does the image show?",
            "What is shown in this image?",
            "Which body part is this?",
            "What does this image show?",
            "Name the body part or object in this image.",
            "What is the body part or object?",
        ),
        closed=("Does this image show {}?", "Is this an image of {}?"),
        held_out_open=("Which body part or object is shown?", "What does the image show?"),
        held_out_closed=("Does the image show {}?",),
    ),
    "sequence": Wordings(
        open=(
            "Which MRI sequence was used?",
            "What is the pulse sequence of this MRI?",
            "What sequence is this MRI?",
            "Name the MRI sequence.",
            "Which sequence is this MRI?",
            "What is the MRI sequence?",
        ),
        closed=("Was the {} sequence used for this MRI?", "Is the sequence of this MRI {}?"),
        held_out_open=("Which pulse sequence was used?", "What is the sequence of this MRI?"),
        held_out_closed=("Is {} the pulse sequence of this MRI?",),
    ),
    "purpose": Wordings(
        open=(
            "Is this an anatomical or a functional MRI?",
            "Which kind of MRI is this, anatomical or functional?",
            "Is this MRI anatomical or functional?",
            "Is the MRI anatomical or functional?",
        ),
        closed=("Is this MRI {}?", "Is this kind of MRI {}?"),
        held_out_open=("Which kind of MRI is shown, anatomical or functional?",),
        held_out_closed=("Is this a {} MRI?",),
    ),
    "application": Wordings(
        open=(
            "For which application was this ultrasound image acquired?",
            "What is the application of this ultrasound image?",
            "Which application is this ultrasound image for?",
            "What is the application?",
            "Name the application of this ultrasound image.",
            "Which application is this?",
        ),
        closed=(
            "Is {} the application of this ultrasound image?",
            "Is the application of this ultrasound image {}?",
        ),
        held_out_open=("For which application is this ultrasound image?",),
        held_out_closed=("Was {} the application of this ultrasound image?",),
    ),
    "stain": Wordings(
        open=(
            "How was this tissue stained?",
            "Which stain was used?",
            "What is the stain of this tissue?",
            "Name the stain of this tissue.",
            "What stain is this?",
        ),
        held_out_open=("What stain was used for this tissue?",),
    ),
    "study": Wordings(
        open=(
            "Which nuclear medicine study is this?",
            "What study is this?",
            "Name the nuclear medicine study.",
            "What nuclear medicine study is this?",
            "Which study is shown?",
            "What is the study?",
        ),
        held_out_open=("What nuclear medicine study is shown?",),
    ),
}
_ARTICLES = {"brain": "the", "head": "the", "abdomen": "the", "whole body": "the", "retina": "the", "colon": "the",
             "single cell": "a", "phantom": "a"}  # fmt: skip
_OVERLAPPING = frozenset({"brain", "head"})
"""Values that may both be true of one picture: never a wrong answer for each other."""


def phrase(attribute: str, value: str) -> str:
    """The value as it stands in a closed question."""
    return f"{_ARTICLES[value]} {value}" if attribute == "body_part" else value


def conversation(image: str, prompt: str, answer: str, **fields: str) -> dict[str, Any]:
    """One record in upstream's schema, without its id."""
    return {
        "image": image,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{prompt}"},
            {"from": "gpt", "value": answer},
        ],
        **fields,
    }


def training_questions(facts: Mapping[str, Mapping[str, str]], rng: random.Random) -> list[dict[str, Any]]:
    """Each attribute of each picture in several wordings; a closed one with the true value and again with a wrong one.

    Of such a pair neither the picture nor the wording tells the answer: the value has to be compared with the picture.

    Args:
        facts: picture name -> attribute -> value.
    """
    records = []
    for image, attribute, value in _triples(facts):
        wordings = QUESTIONS[attribute]
        is_rare = len(_values(facts, attribute)) < RARE_SHARE * len(facts)
        chosen = wordings.open if is_rare else rng.sample(wordings.open, OPEN_PER_ATTRIBUTE)
        records += [_open(image, attribute, value, wording) for wording in chosen]
        if wordings.closed:
            wording = rng.choice(wordings.closed)
            for truth in (True, False):
                records += _closed(facts, image, attribute, truth, wording, rng)
    return records


def evaluation_questions(
    facts: Mapping[str, Mapping[str, str]], rng: random.Random, *, held_out_wordings: bool = False
) -> list[dict[str, Any]]:
    """Each attribute of each picture once openly and once closed; yes and no alternate within an attribute.

    Args:
        facts: picture name -> attribute -> value.
        held_out_wordings: ask in the wordings that training never has.
    """
    records = []
    affirm: dict[str, bool] = defaultdict(lambda: True)
    for image, attribute, value in _triples(facts):
        wordings = QUESTIONS[attribute]
        opened, closed = wordings.open, wordings.closed
        if held_out_wordings:
            opened, closed = wordings.held_out_open, wordings.held_out_closed
        records.append(_open(image, attribute, value, rng.choice(opened)))
        if closed:
            asked = _closed(facts, image, attribute, affirm[attribute], rng.choice(closed), rng)
            records += asked
            affirm[attribute] ^= bool(asked)
    return records


def _triples(facts: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str, str]]:
    return [(image, attribute, value) for image, its in facts.items() for attribute, value in its.items()]


def _open(image: str, attribute: str, value: str, wording: str) -> dict[str, Any]:
    return conversation(image, wording, value, answer_type="open", question_type=attribute)


def _closed(
    facts: Mapping[str, Mapping[str, str]],
    image: str,
    attribute: str,
    truth: bool,
    wording: str,
    rng: random.Random,
) -> list[dict[str, Any]]:
    """One record; none where the attribute has no wrong value."""
    value = facts[image][attribute]
    wrong = [other for other in _values(facts, attribute) if other != value and not {other, value} <= _OVERLAPPING]
    if not wrong:
        return []
    named = value if truth else rng.choice(wrong)
    question = wording.format(phrase(attribute, named))
    kind = f"{attribute}, yes or no"
    return [conversation(image, question, "yes" if truth else "no", answer_type="closed", question_type=kind)]


def _values(facts: Mapping[str, Mapping[str, str]], attribute: str) -> list[str]:
    """True values of all pictures, each as often as it occurs."""
    return [its[attribute] for its in facts.values() if attribute in its]
