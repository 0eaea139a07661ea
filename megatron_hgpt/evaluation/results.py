"""One result of each task: what evaluation produces and the report shows."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(kw_only=True, slots=True)
class VQAResult:
    """One answered question."""

    sample_id: str
    question: str
    image: Image.Image | None
    """What the question is about; None for a text-only question."""
    expected: str
    given: str
    question_type: str = ""
    """As the data set states it (modality, plane …); empty falls back to the first word of the question."""
    baseline: str = ""
    """The most frequent training answer to questions of this type; empty where no training file was named."""


@dataclass(kw_only=True, slots=True)
class ImageResult:
    """One drawn image; `target`, `round_trip` and `output` have one size, that of the VQGAN."""

    sample_id: str
    instruction: str
    input: Image.Image | None
    """None for text -> image."""
    target: Image.Image
    round_trip: Image.Image
    """The target encoded and decoded by the VQGAN: the best that correct indices can give."""
    output: Image.Image
    """What the model drew."""
    kind: str = ""
    """Drawing task: reconstruction, super_resolution, modality_conversion …"""
