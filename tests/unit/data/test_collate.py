"""Image features in place, labels shifted by one, truncation after splicing, padding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from megatron_hgpt.data.collate import ExpandedSample, collate, expand_sample, splice_images
from megatron_hgpt.errors import ConfigError, SkipSample
from megatron_hgpt.samples import IGNORE_INDEX, IMAGE_TOKEN_ID, EncodedSample, Task

X = IGNORE_INDEX


def _stored(tokens: Sequence[int], supervised: Sequence[int], task: Task = Task.COMPREHENSION) -> EncodedSample:
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    mask[list(supervised)] = True
    images = [Image.new("RGB", (6, 4), (i, 0, 0)) for i in range(list(tokens).count(IMAGE_TOKEN_ID))]
    return EncodedSample(sample_id="s", task=task, tokens=torch.tensor(tokens), loss_mask=mask, images=images)


def _expand(stored: EncodedSample, max_seq_length: int = 64) -> ExpandedSample:
    return expand_sample(stored, num_image_tokens=3, image_size=8, max_seq_length=max_seq_length)


def test_splice() -> None:
    tokens, mask = splice_images(torch.tensor([5, IMAGE_TOKEN_ID, 6, IMAGE_TOKEN_ID]), 3)
    assert tokens.tolist() == [5, 0, 0, 0, 6, 0, 0, 0]
    assert mask.tolist() == [False, True, True, True, False, True, True, True]
    tokens, mask = splice_images(torch.tensor([5, 6]), 3)
    assert tokens.tolist() == [5, 6]
    assert not mask.any()


def test_labels_are_the_next_supervised_token() -> None:
    row = _expand(_stored([1, IMAGE_TOKEN_ID, 7, 8, 9], supervised=[2, 3]))
    assert row.tokens.tolist() == [1, 0, 0, 0, 7, 8, 9]
    assert row.labels.tolist() == [X, X, X, 7, 8, X, X]  # the last feature predicts the first answer token
    assert not row.is_truncated
    assert [picture.shape for picture in row.pixel_values] == [(3, 8, 8)]


def test_generation_sample_has_a_label_per_answer_token() -> None:
    """1024 indices, start, end, end token: 1027 labels; none on an image feature but the last one."""
    tokens = [1, IMAGE_TOKEN_ID, 5, *range(100, 100 + 1027)]
    row = expand_sample(_stored(tokens, range(3, 3 + 1027)), num_image_tokens=576, image_size=8, max_seq_length=2048)
    assert int((row.labels != X).sum()) == 1027
    assert len(row.tokens) == 1 + 576 + 1 + 1027
    assert (row.labels[row.image_mask] == X).all()


def test_truncation_counts_the_spliced_sequence() -> None:
    stored = _stored([1, IMAGE_TOKEN_ID, 7, 8, 9], supervised=[2, 3, 4])
    row = _expand(stored, max_seq_length=6)
    assert row.tokens.tolist() == [1, 0, 0, 0, 7, 8]
    assert row.labels.tolist() == [X, X, X, 7, 8, X]
    assert row.is_truncated
    assert not _expand(stored, max_seq_length=7).is_truncated


def test_an_image_is_kept_whole_or_left_out() -> None:
    stored = _stored([1, IMAGE_TOKEN_ID, 7, IMAGE_TOKEN_ID, 8], supervised=[2])
    for limit, length in ((5, 5), (6, 5), (7, 5), (8, 8), (9, 9)):
        row = _expand(stored, max_seq_length=limit)
        assert len(row.tokens) == length
        assert int(row.image_mask.sum()) == 3 * len(row.pixel_values)  # what the model relies on


def test_sample_without_labels_is_skipped() -> None:
    stored = _stored([1, IMAGE_TOKEN_ID, 7, 8], supervised=[3])
    assert _expand(stored, max_seq_length=6).labels.tolist()[-2] == 8
    with pytest.raises(SkipSample) as caught:
        _expand(stored, max_seq_length=5)
    assert caught.value.reason == "no_supervised_token"


def test_collate_pads_on_the_right() -> None:
    short, long = _stored([1, 7], supervised=[1]), _stored([1, IMAGE_TOKEN_ID, 7, 8], supervised=[2, 3])
    batch = collate([(s, _expand(s)) for s in (short, long)], image_size=8, pad_to_multiple=4)
    assert batch.tokens.tolist() == [[1, 7, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 7, 8, 0, 0]]
    assert batch.labels.tolist() == [[7, X, X, X, X, X, X, X], [X, X, X, 7, 8, X, X, X]]
    assert batch.position_ids.tolist() == [list(range(8))] * 2
    assert batch.image_mask.sum(1).tolist() == [0, 3]
    assert batch.pixel_values.shape == (1, 3, 8, 8)
    assert (batch.num_supervised_tokens, batch.num_content_tokens) == (3, 8)
    assert batch.task is Task.COMPREHENSION
    assert batch.image_mask.dtype == torch.bool
    assert collate([(short, _expand(short))], image_size=8).tokens.shape == (1, 2)
    assert collate([(short, _expand(short))], image_size=8).pixel_values.shape == (0, 3, 8, 8)


def test_tasks_do_not_mix() -> None:
    rows = [_stored([1, 7], [1]), _stored([1, 7], [1], Task.GENERATION)]
    with pytest.raises(ConfigError, match="samples of one task"):
        collate([(s, _expand(s)) for s in rows], image_size=8)
