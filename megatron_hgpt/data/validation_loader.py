"""Held-out micro-batches in stored order: the same samples at every layout, each counted once.

Every data-parallel rank yields the same number of micro-batches, because pipeline stages and ZeRO-3 work in step.
Where the samples do not fill the last ones, a micro-batch that was there already comes again and is not counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_hgpt.data.collate import collate
from megatron_hgpt.data.source import open_source
from megatron_hgpt.errors import DataError, SkipSample
from megatron_hgpt.rounding import ceil_div, round_up
from megatron_hgpt.samples import MicroBatch, Task

if TYPE_CHECKING:
    from megatron_hgpt.config import RunConfig
    from megatron_hgpt.data.packing import Indices
    from megatron_hgpt.data.source import SampleSource

logger = logging.getLogger(__name__)

_CHUNK = 16
"""Micro-batches that are in memory at a time."""


@dataclass(kw_only=True, slots=True)
class ValidationChunk:
    """Micro-batches of one task each, and which of them are no repeats."""

    batches: list[MicroBatch]
    is_counted: list[bool]


class ValidationLoader:
    """Yields this rank's part of the held-out samples, as often as it is asked.

    Args:
        source: the samples.
        tasks: what the stage trains; of these, those that the source has are validated.
        micro_batch_size: samples per micro-batch.
        dp_rank, dp_size: this rank's place.
        max_samples: per task, over all ranks; None takes all.
        pad_to_multiple: sequence lengths are padded to a multiple of it.
        multiple_of: the number of micro-batches per rank is a multiple of it (interleaved pipeline: its stages).
        num_workers: threads that build micro-batches; 0 builds them one by one.

    Raises:
        DataError: no sample of any of the tasks.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        tasks: Sequence[Task],
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        max_samples: int | None = None,
        pad_to_multiple: int = 1,
        multiple_of: int = 1,
        num_workers: int = 0,
    ) -> None:
        self._source, self._pad_to_multiple, self._multiple_of = source, pad_to_multiple, multiple_of
        self._dp_rank, self._dp_size, self._num_workers = dp_rank, dp_size, num_workers
        members = {task: source.members(task)[:max_samples] for task in tasks}
        self.num_samples = {task: len(indices) for task, indices in members.items() if len(indices)}
        """Task -> samples of one validation, over all ranks."""
        self._micro_batches: list[Indices] = [
            indices[first : first + micro_batch_size]
            for indices in members.values()
            for first in range(0, len(indices), micro_batch_size)
        ]
        if not self._micro_batches:
            names = " or ".join(task.value for task in tasks)
            raise DataError(f"data.validation has no {names} sample, which the stage trains; add a folder or unset it")
        self._reported: set[int] = set()

    def chunks(self) -> Iterator[ValidationChunk]:
        """This rank's micro-batches; the same number of chunks, of the same sizes, on every rank.

        Raises:
            DataError: not one sample can be used.
        """
        per_rank = round_up(ceil_div(len(self._micro_batches), self._dp_size), self._multiple_of)
        size = round_up(_CHUNK, self._multiple_of)
        numbers = [i * self._dp_size + self._dp_rank for i in range(per_rank)]
        with ThreadPoolExecutor(max(self._num_workers, 1), thread_name_prefix="validation") as executor:
            for first in range(0, per_rank, size):
                part = numbers[first : first + size]
                built = list(executor.map(self._build, part) if self._num_workers else map(self._build, part))
                yield ValidationChunk(batches=[batch for batch, _ in built], is_counted=[one for _, one in built])

    def _build(self, number: int) -> tuple[MicroBatch, bool]:
        """Micro-batch `number` and True; or, where there is none or it has no usable sample, another and False."""
        total = len(self._micro_batches)
        for offset in range(total):
            samples = []
            for index in self._micro_batches[(number + offset) % total]:
                try:
                    samples.append(self._source.load(int(index)))
                except SkipSample as error:
                    self._report(int(index), error)
            if samples:
                batch = collate(samples, image_size=self._source.image_size, pad_to_multiple=self._pad_to_multiple)
                return batch, offset == 0 and number < total
        raise DataError("no sample of data.validation can be used; check its folders, or unset it")

    def _report(self, index: int, error: SkipSample) -> None:
        if index not in self._reported:
            self._reported.add(index)
            logger.warning("validation sample left out: %s", error)


def build_validation_loader(
    config: RunConfig,
    *,
    tokenizer_hash: str,
    num_image_tokens: int,
    image_size: int,
    tasks: Sequence[Task],
    dp_rank: int = 0,
    dp_size: int = 1,
    pad_to_multiple: int = 1,
) -> ValidationLoader | None:
    """The loader over `config.data.validation`; None where that is empty.

    Raises:
        DataError: a folder does not fit the model, or none has a sample of a task in `tasks`.
    """
    if not config.data.validation:
        return None
    source = open_source(
        config,
        config.data.validation,
        tokenizer_hash=tokenizer_hash,
        num_image_tokens=num_image_tokens,
        image_size=image_size,
        tasks=tasks,
    )
    parallel = config.parallel
    is_interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return ValidationLoader(
        source,
        tasks=tasks,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        max_samples=config.training.validation_samples,
        pad_to_multiple=pad_to_multiple,
        multiple_of=parallel.pipeline_model_parallel_size if is_interleaved else 1,
        num_workers=config.data.num_workers,
    )
