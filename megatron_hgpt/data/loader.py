"""Which samples make up a step, and their micro-batches on this rank.

The life of a sample:

1. An endless sequence of micro-batches is defined by seed, batch size and datasets alone. Each is of one task; the
   tasks alternate evenly, in proportion to their samples or by `data.mixture`.
2. Within a task, each of its epochs is a shuffle of all its samples, cut into micro-batches; the last one is filled
   up from the start of the same shuffle.
   With packing a micro-batch is one row of samples; the rows are fixed by the seed, and an epoch shuffles them.
3. Step s takes micro-batches s*M … s*M + M-1, M = global batch / micro-batch; data-parallel rank r those at r,
   r + dp, … So a step holds the same samples for every layout, and resuming is a matter of the step number.
4. A sample that cannot be used is replaced by the next one of its task's shuffle (left out of its packed row), and
   counted.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_hgpt.config import RunConfig
from megatron_hgpt.data.collate import ExpandedSample, collate, collate_packed, splice_images
from megatron_hgpt.data.packing import Indices, packed_rows
from megatron_hgpt.data.source import SampleSource, open_source
from megatron_hgpt.errors import ConfigError, DataError, HungError, SkipSample
from megatron_hgpt.rounding import ceil_div
from megatron_hgpt.samples import EncodedSample, MicroBatch, Task

__all__ = ["TrainLoader", "build_loader", "splice_images"]

logger = logging.getLogger(__name__)

MAX_CONSECUTIVE_SKIPS = 100
"""Unusable samples in a row after which the data as a whole is at fault."""


class TaskSchedule:
    """The task of each micro-batch, spread evenly: O(1) for any position.

    Args:
        weights: task (None: both, packed together) -> share of the micro-batches (not all 0).
    """

    def __init__(self, weights: dict[Task | None, Fraction]) -> None:
        self._tasks = [task for task, weight in weights.items() if weight > 0]
        total = sum(weights.values(), Fraction(0))
        self._first_share = weights[self._tasks[0]] / total

    def __call__(self, index: int) -> tuple[Task | None, int]:
        """Task of micro-batch `index`, and how many of that task came before it."""
        before, after = self._num_first(index), self._num_first(index + 1)
        return (self._tasks[0], before) if after > before else (self._tasks[1], index - before)

    def _num_first(self, length: int) -> int:
        return int(length * self._first_share + Fraction(1, 2))  # rounding: exact at whole epochs, no drift


class TrainLoader:
    """Endless, deterministic, resumable; `next_step` gives this rank's micro-batches of the next optimizer step.

    Args:
        source: the samples.
        tasks: what the stage trains; samples of other tasks are not drawn.
        seed: with the epoch, decides the order.
        micro_batch_size: samples per micro-batch.
        global_batch_size: samples per step over all ranks.
        dp_rank, dp_size: this rank's place.
        mixture: task -> weight; empty means in proportion to the samples.
        shuffle: False keeps the stored order.
        num_workers: threads that build micro-batches ahead; 0 builds them when asked.
        pad_to_multiple: sequence lengths are padded to a multiple of it.
        packing: none, by_task or mixed (`DataConfig.packing`); rows take the place of samples in the batch sizes.
        pack_length: tokens of a packed row at most.
        timeout_s: seconds to wait for one step's samples; with `num_workers` only.

    Raises:
        ConfigError: batch sizes, mixture or pack length do not fit.
        DataError: no sample of a task that the stage trains.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        tasks: Sequence[Task],
        seed: int,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        mixture: dict[str, float] | None = None,
        shuffle: bool = True,
        num_workers: int = 0,
        pad_to_multiple: int = 1,
        packing: str = "none",
        pack_length: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        if global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                f"training.global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size} x data-parallel size {dp_size}; change one of them"
            )
        self._source, self._seed, self._shuffle = source, seed, shuffle
        self._micro_batch_size, self._pad_to_multiple = micro_batch_size, pad_to_multiple
        self._dp_rank, self._dp_size, self._timeout_s = dp_rank, dp_size, timeout_s
        self._num_micro_batches = global_batch_size // micro_batch_size
        shares = _shares(tasks, mixture or {})
        samples = {task: source.members(task) for task in shares}
        for task, members in samples.items():
            if not len(members):
                raise DataError(f"data.train has no {task.value} sample, which the stage trains; add a folder of them")
        self._samples = {task: len(members) for task, members in samples.items()}
        self._packing, self._pack_length, self._mixture = packing, pack_length, dict(mixture or {})
        self._rows: dict[Task | None, list[Indices]] = {}
        self._members: dict[Task | None, Indices] = dict(samples.items())
        if packing != "none":
            self._rows = packed_rows(samples, source.lengths, mixed=packing == "mixed", capacity=pack_length, seed=seed)
            self._members = {task: np.arange(len(rows)) for task, rows in self._rows.items()}
        self._per_epoch = {task: ceil_div(len(members), micro_batch_size) for task, members in self._members.items()}
        self._schedule = TaskSchedule(
            {task: shares.get(task) or Fraction(count) for task, count in self._per_epoch.items()}  # type: ignore[arg-type]
        )
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="loader") if num_workers > 0 else None
        self._ahead: tuple[int, list[Future[tuple[MicroBatch, Counter[str]]]]] | None = None
        self._step = 0
        self.counts: Counter[str] = Counter()
        """Samples of this rank that were truncated, and skipped by reason (``skipped/<reason>``)."""

    @property
    def num_samples(self) -> dict[Task, int]:
        """Task -> samples of one epoch."""
        return dict(self._samples)

    @property
    def epoch_size(self) -> int:
        """What an epoch draws from: the samples, or the packed rows of them."""
        return sum(len(members) for members in self._members.values())

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every sample was drawn at least once (with a mixture: as many micro-batches)."""
        return ceil_div(sum(self._per_epoch.values()), self._num_micro_batches)

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next optimizer step.

        Raises:
            DataError: too many unusable samples in a row.
            HungError: they did not come in time.
        """
        step, self._step = self._step, self._step + 1
        if self._executor is None:
            built = [self._build(index) for index in self._indices(step)]
        else:
            futures = self._ahead[1] if self._ahead is not None and self._ahead[0] == step else self._submit(step)
            self._ahead = (step + 1, self._submit(step + 1))
            if wait(futures, self._timeout_s).not_done:
                raise HungError(
                    f"the samples of step {step + 1} were not there after {self._timeout_s:g} s (timeouts.loader_s) on "
                    f"data-parallel rank {self._dp_rank}; look at the storage of data.train, or raise data.num_workers"
                )
            built = [future.result() for future in futures]
        for _, counts in built:
            self.counts.update(counts)
        return [batch for batch, _ in built]

    def state_dict(self) -> dict[str, Any]:
        """The next step, and what the meaning of a step number depends on."""
        return {
            "step": self._step,
            "seed": self._seed,
            "datasets": self._source.digests,
            "mixture": self._mixture,
            "shuffle": self._shuffle,
            "num_samples": sum(self._samples.values()),
            "packing": self._packing,
            "pack_length": self._pack_length if self._rows else 0,
            "num_micro_batches": sum(self._per_epoch.values()),
            "micro_batch_size": self._micro_batch_size,
            "num_micro_batches_per_step": self._num_micro_batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken: O(1), nothing is read again.

        A change of data, mixture, shuffle, packing or batch size is allowed, with a warning: samples may then repeat or
        be left out.
        """
        now = self.state_dict()
        for name in (name for name in now if name != "step"):
            if name in state and state[name] != now[name]:
                logger.warning(
                    "data order: %s was %s when the checkpoint was written and is %s now; samples may repeat or be "
                    "left out in this epoch",
                    name,
                    state[name],
                    now[name],
                )
        self._step = int(state["step"])
        self._drop_ahead()

    def close(self) -> None:
        """Stop the worker threads."""
        self._drop_ahead()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            for future in self._ahead[1]:
                future.cancel()
            self._ahead = None

    def _submit(self, step: int) -> list[Future[tuple[MicroBatch, Counter[str]]]]:
        assert self._executor is not None
        return [self._executor.submit(self._build, index) for index in self._indices(step)]

    def _indices(self, step: int) -> range:
        first = step * self._num_micro_batches
        return range(first + self._dp_rank, first + self._num_micro_batches, self._dp_size)

    def _shuffled(self, task: Task | None, epoch: int) -> Indices:
        """Samples of a task, or numbers of its rows, in the order of an epoch."""
        members = self._members[task]
        if not self._shuffle:
            return members
        code = len(Task) if task is None else task.code
        return np.random.default_rng([self._seed, epoch, code]).permutation(members)

    def _build(self, index: int) -> tuple[MicroBatch, Counter[str]]:
        """Micro-batch `index` of the endless sequence."""
        task, ordinal = self._schedule(index)
        epoch, position = divmod(ordinal, self._per_epoch[task])
        order = self._order(task, epoch)
        counts: Counter[str] = Counter()
        if self._rows:
            samples, assemble = self._usable_row(self._rows[task], order, position, counts), collate_packed
        else:
            first = position * self._micro_batch_size
            samples = [self._usable(order, first + i, counts) for i in range(self._micro_batch_size)]
            assemble = collate
        counts["truncated"] += sum(expanded.is_truncated for _, expanded in samples)
        return assemble(samples, image_size=self._source.image_size, pad_to_multiple=self._pad_to_multiple), counts

    def _usable_row(
        self, rows: list[Indices], order: Indices, position: int, counts: Counter[str]
    ) -> list[tuple[EncodedSample, ExpandedSample]]:
        """The usable samples of the row at `position` of a shuffle, or of the next row that has any."""
        for offset in range(len(order)):
            samples = []
            for index in rows[order[(position + offset) % len(order)]]:
                try:
                    samples.append(self._source.load(int(index)))
                except SkipSample as error:
                    counts[f"skipped/{error.reason}"] += 1
                    logger.warning("sample skipped, its packed row goes on without it: %s", error)
            if samples:
                return samples
            if sum(counts.values()) >= MAX_CONSECUTIVE_SKIPS:
                break
        raise DataError(f"no usable sample in {offset + 1} packed rows ({dict(counts)}); check the dataset folders")

    def _usable(self, order: Indices, position: int, counts: Counter[str]) -> tuple[EncodedSample, ExpandedSample]:
        """The sample at `position` of a shuffle (it wraps around), or the next one that can be used."""
        num_tries = min(MAX_CONSECUTIVE_SKIPS, len(order))
        for offset in range(num_tries):
            try:
                return self._source.load(int(order[(position + offset) % len(order)]))
            except SkipSample as error:
                counts[f"skipped/{error.reason}"] += 1
                logger.warning("sample skipped, the next one takes its place: %s", error)
        raise DataError(f"{num_tries} samples in a row cannot be used ({dict(counts)}); check the dataset folders")


def _shares(tasks: Sequence[Task], mixture: dict[str, float]) -> dict[Task, Fraction | None]:
    """Task -> weight (None: by its samples), for the tasks to draw from.

    Raises:
        ConfigError: unknown task, negative weight, or no weight for a task that is trained.
    """
    known = {task.value for task in Task}
    for name, weight in mixture.items():
        if name not in known or weight < 0:
            raise ConfigError(f"data.mixture {name}: {weight}; give {' or '.join(sorted(known))} a weight of 0 or more")
    if not mixture:
        return dict.fromkeys(tasks)
    missing = [task.value for task in tasks if task.value not in mixture]
    if missing:
        raise ConfigError(f"data.mixture has no weight for {missing[0]}, which the stage trains; 0 leaves it out")
    shares = {task: Fraction(mixture[task.value]).limit_denominator(10**6) for task in tasks}
    if not any(shares.values()):
        raise ConfigError(f"data.mixture gives weight 0 to all of {[task.value for task in tasks]}; raise one")
    return {task: share for task, share in shares.items() if share > 0}


def build_loader(
    config: RunConfig,
    *,
    tokenizer_hash: str,
    num_image_tokens: int,
    image_size: int,
    dp_rank: int,
    dp_size: int,
    tasks: Sequence[Task],
    global_batch_size: int,
    pad_to_multiple: int = 1,
) -> TrainLoader:
    """The training loader of a run over `config.data.train`.

    Raises:
        DataError: no dataset, one that does not fit the model, or no sample of a task in `tasks`.
        ConfigError: batch sizes or mixture do not fit.
    """
    if not config.data.train:
        raise DataError("data.train names no dataset folder; write one with hgpt preprocess")
    source = open_source(
        config,
        config.data.train,
        tokenizer_hash=tokenizer_hash,
        num_image_tokens=num_image_tokens,
        image_size=image_size,
        tasks=tasks,
    )
    return TrainLoader(
        source,
        tasks=tasks,
        seed=config.training.seed,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=global_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        mixture=config.data.mixture,
        shuffle=config.data.shuffle,
        num_workers=config.data.num_workers,
        pad_to_multiple=pad_to_multiple,
        packing=config.data.packing,
        pack_length=config.data.pack_length or config.model.max_seq_length,
        timeout_s=config.timeouts.loader_s,
    )
