"""What mini VL-Health asks about a picture: several wordings of each question, some of them never used in training.

A model that has met one wording only answers that wording. Each attribute of a training picture is asked in several of
its wordings, so that what is asked counts and not how; the held-out wordings then measure how far that carries.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
        closed=(
            "Was this image acquired with {}?",
            "Is {} the modality of this image?",
            "Is the modality of this image {}?",
            "Was {} used to acquire this image?",
        ),
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
        closed=(
            "Is this slice in the {} plane?",
            "Is the orientation of this slice {}?",
            "Was this slice taken in the {} plane?",
        ),
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
        closed=("Does this image show {}?", "Is {} shown in this image?", "Is this an image of {}?"),
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
        closed=("Was a {} sequence used for this MRI?", "Is the sequence of this MRI {}?"),
        held_out_open=("Which pulse sequence was used?", "What is the sequence of this MRI?"),
        held_out_closed=("Is this MRI a {} sequence?",),
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
    """Each attribute of each picture in several wordings, and once for yes or no.

    Args:
        facts: picture name -> attribute -> value.
    """

    def wordings(attribute: str) -> Sequence[str]:
        every = QUESTIONS[attribute].open
        is_rare = len(_values(facts, attribute)) < RARE_SHARE * len(facts)
        return every if is_rare else rng.sample(every, OPEN_PER_ATTRIBUTE)

    return _questions(facts, rng, wordings, {name: its.closed for name, its in QUESTIONS.items()})


def evaluation_questions(
    facts: Mapping[str, Mapping[str, str]], rng: random.Random, *, held_out_wordings: bool = False
) -> list[dict[str, Any]]:
    """Each attribute of each picture once openly and once for yes or no, in training's wordings or held-out ones."""
    opened = {name: its.held_out_open if held_out_wordings else its.open for name, its in QUESTIONS.items()}
    closed = {name: its.held_out_closed if held_out_wordings else its.closed for name, its in QUESTIONS.items()}
    return _questions(facts, rng, lambda attribute: [rng.choice(opened[attribute])], closed)


def _questions(
    facts: Mapping[str, Mapping[str, str]],
    rng: random.Random,
    opened: Callable[[str], Sequence[str]],
    closed: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """Open questions in the wordings of `opened`, and a closed one; yes and no alternate within an attribute."""
    records = []
    affirm: dict[str, bool] = defaultdict(lambda: True)
    for image, its in facts.items():
        for attribute, value in its.items():
            records += [_open(image, attribute, value, wording) for wording in opened(attribute)]
            asked = _closed(facts, image, attribute, affirm[attribute], closed[attribute], rng)
            records += asked
            affirm[attribute] ^= bool(asked)
    return records


def _open(image: str, attribute: str, value: str, wording: str) -> dict[str, Any]:
    return conversation(image, wording, value, answer_type="open", question_type=attribute)


def _closed(
    facts: Mapping[str, Mapping[str, str]],
    image: str,
    attribute: str,
    truth: bool,
    wordings: Sequence[str],
    rng: random.Random,
) -> list[dict[str, Any]]:
    """One record; none where the attribute has no closed wording or no wrong value."""
    value = facts[image][attribute]
    wrong = [other for other in _values(facts, attribute) if other != value and not {other, value} <= _OVERLAPPING]
    if not wordings or not wrong:
        return []
    named = value if truth else rng.choice(wrong)
    question = rng.choice(wordings).format(phrase(attribute, named))
    kind = f"{attribute}, yes or no"
    return [conversation(image, question, "yes" if truth else "no", answer_type="closed", question_type=kind)]


def _values(facts: Mapping[str, Mapping[str, str]], attribute: str) -> list[str]:
    """True values of all pictures, each as often as it occurs."""
    return [its[attribute] for its in facts.values() if attribute in its]
