"""A dataset is refused by a model that it was not made for; a damaged sample is skipped, not trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hgpt.data.dataset import VLDataset
from megatron_hgpt.data.mmap_format import DatasetWriter
from megatron_hgpt.data.source import SampleSource
from megatron_hgpt.errors import DataError, SkipSample
from megatron_hgpt.samples import IMAGE_TOKEN_ID, Task
from megatron_hgpt.text.vocabulary import Vocabulary
from megatron_hgpt.vision.preprocess import load_image

Make = Callable[..., Path]


def _open(folder: Path, model_vocabulary: Vocabulary, **changes: Any) -> VLDataset:
    options: dict[str, Any] = {"vocabulary": model_vocabulary, "tokenizer_hash": "abc", "template": "phi3_instruct"}
    return VLDataset(folder, **{**options, **changes})


def test_samples(tmp_path: Path, make_dataset: Make, vocabulary: Vocabulary) -> None:
    dataset = _open(make_dataset(tmp_path / "d", [Task.COMPREHENSION, Task.GENERATION]), vocabulary, num_indices=4)
    assert len(dataset) == 2
    assert dataset.tasks.tolist() == [0, 1]
    sample = dataset[1]
    assert (sample.sample_id, sample.task) == ("g1", Task.GENERATION)
    assert torch.equal(sample.tokens, torch.tensor([1, IMAGE_TOKEN_ID, 11, 21]))
    assert sample.loss_mask.tolist() == [False, False, True, True]
    (picture,) = map(load_image, sample.images)
    assert (picture.size, picture.getpixel((0, 0))) == ((12, 8), (1, 1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_hash": "other"}, r"tokenizer \(sha256\) of the dataset is 'abc', the run's is 'other'"),
        ({"template": "plain"}, "template of the dataset is 'phi3_instruct', the run's is 'plain'"),
        ({"system_prompt": "Hi."}, "system prompt of the dataset is 'You are a helpful AI assistant.'"),
        ({"template": "plain"}, "or set model.template=phi3_instruct$"),
        ({"max_image_side": 1024}, r"largest side of pictures \(0: any\) of the dataset is 0, the run's is 1024"),
        ({"num_indices": 5}, "VQ indices per image of the dataset is 4, the run's is 5"),
        ({"vocabulary": Vocabulary(text_size=401, num_codes=16)}, "vocabulary text_size of the dataset is 400"),
        ({"vocabulary": Vocabulary(text_size=400, num_codes=8)}, "vocabulary num_codes of the dataset is 16"),
    ],
)
def test_a_dataset_of_another_model_is_refused(
    tmp_path: Path, make_dataset: Make, vocabulary: Vocabulary, changes: dict[str, Any], message: str
) -> None:
    folder = make_dataset(tmp_path / "d", [Task.COMPREHENSION])
    with pytest.raises(DataError, match=message) as caught:
        _open(folder, vocabulary, **changes)
    assert "write the dataset again" in str(caught.value)


def test_padding_of_the_vocabulary_does_not_matter(tmp_path: Path, make_dataset: Make, vocabulary: Vocabulary) -> None:
    folder = make_dataset(tmp_path / "d", [Task.COMPREHENSION])
    assert len(_open(folder, replace(vocabulary, pad_to_multiple=1))) == 1


@pytest.mark.parametrize(
    ("tokens", "images"), [([1, 2], [b"x"]), ([1, IMAGE_TOKEN_ID], []), ([1, 419], []), ([-5, 2], [])]
)
def test_corrupt_sample(
    tmp_path: Path, vocabulary: Vocabulary, make_dataset: Make, tokens: list[int], images: list[bytes]
) -> None:
    assert vocabulary.size == 419
    reference = _open(make_dataset(tmp_path / "reference", [Task.COMPREHENSION]), vocabulary).manifest
    with DatasetWriter(tmp_path / "d") as writer:
        writer.add(sample_id="a", task=Task.COMPREHENSION, tokens=tokens, loss_mask=[False, True], images=images)
        writer.finish({key: reference[key] for key in ("tokenizer", "template", "vocabulary", "vq")})
    with pytest.raises(SkipSample, match="corrupt_sample"):
        _open(tmp_path / "d", vocabulary)[0]


def test_unreadable_picture_is_skipped(tmp_path: Path, make_dataset: Make, vocabulary: Vocabulary) -> None:
    dataset = _open(make_dataset(tmp_path / "d", [Task.COMPREHENSION], bad=[0]), vocabulary)
    source = SampleSource([dataset], num_image_tokens=3, image_size=8, max_seq_length=16)
    with pytest.raises(SkipSample, match="unreadable_image"):
        source.load(0)
