"""Ask a trained model a whole test file: answers for comprehension records, pictures for generation records.

Samples are split over data-parallel ranks; rank 0 gathers, in file order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from megatron_hgpt.errors import ConfigError, DataError, SkipSample
from megatron_hgpt.evaluation.results import ImageResult, VQAResult
from megatron_hgpt.evaluation.vqa import majority_answers, question_type
from megatron_hgpt.inference.generator import Prompt
from megatron_hgpt.inference.loading import LoadedRun
from megatron_hgpt.samples import Sample, Task
from megatron_hgpt.vision.preprocess import load_image
from megatron_hgpt.vl_health.llava_json import parse_record, read_records, record_id

logger = logging.getLogger(__name__)

SHOWN_PER_REASON = 5
"""Skipped records that are named, of each reason; the others are counted."""


def read_samples(path: Path, image_root: Path) -> tuple[list[Sample], dict[str, int]]:
    """Samples of a JSON file, and the count of skipped records by reason.

    Raises:
        DataError: there is none that can be used.
    """
    samples: list[Sample] = []
    skipped: dict[str, int] = {}
    for number, record in enumerate(read_records(path)):
        try:
            samples.append(parse_record(record, image_root, default_id=str(number)))
        except SkipSample as error:
            _skip(skipped, record_id(record, str(number)), error)
    if not samples:
        reason = f"skipped: {_text_of(skipped)}; check --image-root, now {image_root}" if skipped else "it is empty"
        raise DataError(f"no usable record in {path}; {reason}")
    if skipped:
        logger.warning("%s: %d records are used; skipped: %s", path, len(samples), _text_of(skipped))
    return samples, skipped


def readable(samples: Sequence[Sample]) -> list[Sample]:
    """Those whose pictures can all be decoded: one damaged file does not end an evaluation."""
    kept: list[Sample] = []
    skipped: dict[str, int] = {}
    for sample in samples:
        try:
            for picture in (*sample.images, sample.target_image):
                if picture is not None:
                    load_image(picture)
        except SkipSample as error:
            _skip(skipped, sample.sample_id, error)
        else:
            kept.append(sample)
    if skipped:
        logger.warning("%d records are used; skipped: %s", len(kept), _text_of(skipped))
    return kept


def _skip(skipped: dict[str, int], name: str, error: SkipSample) -> None:
    """Count a record, and name it if it is one of the first of its reason."""
    skipped[error.reason] = skipped.get(error.reason, 0) + 1
    if skipped[error.reason] <= SHOWN_PER_REASON:
        logger.warning("record %s skipped: %s", name, error)


def _text_of(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in skipped.items())


def majority_baseline(path: Path, image_root: Path) -> dict[str, str]:
    """Question type -> the most frequent answer in a training file, which evaluation reports beside the model's."""
    samples, _ = read_samples(path, image_root)
    return majority_answers(
        (_question_type(sample), sample.turns[1].text.strip())
        for sample in samples
        if sample.task is Task.COMPREHENSION
    )


def _question_type(sample: Sample) -> str:
    return question_type(sample.turns[0].text, str(sample.metadata.get("question_type", "")))


def answer_samples(
    run: LoadedRun, samples: Iterable[Sample], *, max_new_tokens: int, baseline: Mapping[str, str] | None = None
) -> list[VQAResult]:
    """Ask the first question of each conversation greedily; `baseline` is that of `majority_baseline`."""
    samples = list(samples)
    prompts = [
        Prompt(task=Task.COMPREHENSION, question=sample.turns[0].text, images=list(sample.images)) for sample in samples
    ]
    given = run.generator.answer(prompts, max_new_tokens=max_new_tokens)
    return [
        VQAResult(
            sample_id=sample.sample_id,
            question=sample.turns[0].text.replace("<image>", "").strip(),
            image=load_image(sample.images[0]) if sample.images else None,
            expected=sample.turns[1].text.strip(),
            given=answer,
            question_type=str(sample.metadata.get("question_type", "")),
            baseline=(baseline or {}).get(_question_type(sample), ""),
        )
        for sample, answer in zip(samples, given, strict=True)
    ]


def draw_samples(run: LoadedRun, samples: Iterable[Sample]) -> list[ImageResult]:
    """Draw each generation record's picture; targets are compared at the VQGAN's resolution.

    Raises:
        ConfigError: there are such records, and the run has no VQGAN.
    """
    samples = [sample for sample in samples if sample.target_image is not None]
    if not samples:
        return []
    vqgan = run.require_vqgan()
    prompts = [
        Prompt(task=Task.GENERATION, question=sample.turns[0].text, images=list(sample.images)) for sample in samples
    ]
    drawn = run.generator.draw_images(prompts, vqgan)
    results = []
    for sample, output in zip(samples, drawn, strict=True):
        target = vqgan.preprocess(load_image(cast(Path, sample.target_image))).unsqueeze(0).to(run.context.device)
        with torch.inference_mode():
            round_trip = vqgan.decode(vqgan.encode(target))[0]
        results.append(
            ImageResult(
                sample_id=sample.sample_id,
                instruction=sample.turns[0].text.replace("<image>", "").strip(),
                input=load_image(sample.images[0]) if sample.images else None,
                target=vqgan.to_pil(target[0]),
                round_trip=vqgan.to_pil(round_trip),
                output=output,
                kind=str(sample.metadata.get("kind", "")),
            )
        )
    return results


def evaluate(
    run: LoadedRun,
    path: Path,
    image_root: Path,
    *,
    max_vqa: int | None = None,
    max_images: int | None = None,
    max_new_tokens: int = 64,
    baseline: Mapping[str, str] | None = None,
) -> tuple[list[VQAResult], list[ImageResult]] | None:
    """All results in file order on rank 0, None on the others.

    Args:
        run: the model.
        path: JSON or JSON-lines file in the upstream schema.
        image_root: folder its image paths are relative to.
        max_vqa, max_images: at most so many of each, evenly spaced over the file; None takes all.
        max_new_tokens: limit of one answer, tokens.
        baseline: question type -> answer of a guesser who never looks (`majority_baseline`); None leaves it out.

    Raises:
        DataError: no record can be used.
        ConfigError: pictures are to be drawn, and the run has no VQGAN.
    """
    samples, _ = read_samples(path, image_root)
    limits = {Task.COMPREHENSION: max_vqa, Task.GENERATION: max_images}
    chosen = {task: _evenly([s for s in samples if s.task is task], limit) for task, limit in limits.items()}
    if any(sample.target_image is not None for sample in chosen[Task.GENERATION]):
        _require_vqgan(run, path)  # before minutes of answering
    rank, size = run.context.dp_rank, run.context.dp_size
    own = {task: readable(members[rank::size]) for task, members in chosen.items()}
    mine: tuple[list[Any], list[Any]] = (
        answer_samples(run, own[Task.COMPREHENSION], max_new_tokens=max_new_tokens, baseline=baseline),
        draw_samples(run, own[Task.GENERATION]),
    )
    if run.context.world_size == 1:
        return mine
    gathered: list[Any] | None = [None] * run.context.world_size if run.context.is_writer else None
    # Tensor-parallel peers hold the same results: only the first of each replica sends its own.
    torch.distributed.gather_object(mine if run.context.tp_rank == 0 else ([], []), gathered)
    if gathered is None:
        return None
    order = {sample.sample_id: i for i, sample in enumerate(samples)}
    return tuple(  # type: ignore[return-value]
        sorted((result for part in gathered for result in part[kind]), key=lambda result: order[result.sample_id])
        for kind in (0, 1)
    )


def _require_vqgan(run: LoadedRun, path: Path) -> None:
    try:
        run.require_vqgan()
    except ConfigError as error:
        raise ConfigError(f"{path} has pictures to draw: {error}, or leave them out with --max-images 0") from error


def _evenly(items: list[Sample], limit: int | None) -> list[Sample]:
    if limit is None or len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
