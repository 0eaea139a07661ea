"""The samples of all dataset folders as one sequence, ready to be collated."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from megatron_hgpt.config import RunConfig
from megatron_hgpt.data.collate import ExpandedSample, expand_sample
from megatron_hgpt.data.dataset import VLDataset
from megatron_hgpt.data.feature_cache import open_caches
from megatron_hgpt.data.packing import Indices
from megatron_hgpt.samples import EncodedSample, Task
from megatron_hgpt.text.templates import template_of
from megatron_hgpt.text.vocabulary import Vocabulary


class SampleSource:
    """Samples of several folders as one sequence, expanded for the model; unusable ones raise `SkipSample`."""

    def __init__(
        self, datasets: Sequence[VLDataset], *, num_image_tokens: int, image_size: int, max_seq_length: int
    ) -> None:
        self._datasets = list(datasets)
        self._ends = list(accumulate(len(dataset) for dataset in datasets))
        self._expand = functools.partial(
            expand_sample, num_image_tokens=num_image_tokens, image_size=image_size, max_seq_length=max_seq_length
        )
        self.image_size = image_size
        # An over-long sample is cut to max_seq_length: no sample takes more room.
        self.lengths = np.concatenate([dataset.lengths(num_image_tokens) for dataset in datasets]).clip(
            max=max_seq_length
        )
        self.tasks = np.concatenate([dataset.tasks for dataset in datasets])
        self.digests = [dataset.digest for dataset in datasets]
        """`VLDataset.digest` of each folder."""

    def load(self, index: int) -> tuple[EncodedSample, ExpandedSample]:
        """Sample `index` over all folders.

        Raises:
            SkipSample: it cannot be used.
        """
        folder = bisect_right(self._ends, index)
        stored = self._datasets[folder][index - (self._ends[folder - 1] if folder else 0)]
        return stored, self._expand(stored)

    def members(self, task: Task) -> Indices:
        """Indices of the samples of one task."""
        return np.flatnonzero(self.tasks == task.code)


def open_source(
    config: RunConfig,
    folders: Sequence[str],
    *,
    tokenizer_hash: str,
    num_image_tokens: int,
    image_size: int,
    tasks: Sequence[Task],
) -> SampleSource:
    """The samples of `folders`, with the features of `data.feature_cache` where one is configured.

    Raises:
        DataError: a folder, or its cache, does not fit the model.
    """
    datasets = [
        VLDataset(
            folder,
            vocabulary=Vocabulary.from_config(config.model),
            tokenizer_hash=tokenizer_hash,
            template=template_of(config.model),
            system_prompt=config.model.system_prompt,
            num_indices=config.model.vq.num_indices,
            max_image_side=config.data.max_image_side,
            features=features,
        )
        for folder, features in zip(folders, open_caches(config, folders, tasks), strict=True)
    ]
    return SampleSource(
        datasets,
        num_image_tokens=num_image_tokens,
        image_size=image_size,
        max_seq_length=config.model.max_seq_length,
    )
