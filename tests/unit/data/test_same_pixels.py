"""Training and inference give the tower the same pixels of a large picture, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_hgpt.config import RunConfig
from megatron_hgpt.data.preprocess import Input, PreprocessOptions, preprocess
from megatron_hgpt.data.source import open_source
from megatron_hgpt.errors import DataError
from megatron_hgpt.inference.generator import Generator, Prompt
from megatron_hgpt.samples import Task
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary

QUESTION = "<image>\nIs this CT?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3000 x 2000 of rings that become finer outwards: whatever shrinks it differently shows."""
    rows, columns = np.mgrid[0:2000, 0:3000].astype(np.float32)
    radius = (rows - 700) ** 2 + (columns - 1100) ** 2
    values = (127.5 + 127.5 * np.cos(radius / 4000)).astype(np.uint8)
    path = tmp_path_factory.mktemp("picture") / "a.jpg"
    Image.fromarray(np.stack([values, values // 2, 255 - values], -1)).save(path)
    record = {
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "yes"}],
    }
    (path.parent / "train.json").write_text(json.dumps([record]))
    return path


def _in_training(picture: Path, folder: Path, tokenizer: TextTokenizer, stored_side: int, side: int) -> torch.Tensor:
    """What the loader hands out; written with `stored_side`, read by a run of `side`."""
    config = RunConfig()
    config.model.template, config.model.vocabulary.text_size = "phi3_instruct", 400
    config.model.vq.num_codes, config.model.vq.num_indices, config.data.max_image_side = 16, 4, side
    options = PreprocessOptions(template="phi3_instruct", num_indices=4, max_image_side=stored_side)
    preprocess(
        [Input(path=picture.parent / "train.json")],
        folder,
        tokenizer=tokenizer,
        vocabulary=Vocabulary.from_config(config.model),
        options=options,
    )
    source = open_source(
        config, [str(folder)], tokenizer_hash=tokenizer.hash, num_image_tokens=64, image_size=336,
        tasks=[Task.COMPREHENSION],
    )  # fmt: skip
    return torch.stack(source.load(0)[1].pixel_values)


def _in_inference(picture: Path, tokenizer: TextTokenizer, side: int) -> torch.Tensor:
    model: Any = SimpleNamespace(
        vocabulary=Vocabulary(text_size=400, num_codes=16),
        tower=SimpleNamespace(num_image_tokens=64, image_size=336),
    )
    generator = Generator(model, tokenizer, template="phi3_instruct", num_indices=4, max_image_side=side)
    return generator.encode(Prompt(task=Task.COMPREHENSION, question=QUESTION, images=[picture])).pixel_values


@pytest.mark.parametrize("side", [0, 1024])
def test_training_and_inference_see_the_same_pixels(
    side: int, picture: Path, tmp_path: Path, sentencepiece: TextTokenizer
) -> None:
    trained = _in_training(picture, tmp_path / "data", sentencepiece, side, side)
    answered = _in_inference(picture, sentencepiece, side)
    assert trained.shape == (1, 3, 336, 336)
    assert torch.equal(trained, answered)
    # What was done before: pictures shrunk for training alone. It differs by more than rounding.
    other = _in_inference(picture, sentencepiece, 1024 - side)
    assert (trained - other).abs().max() > 0.05


def test_a_dataset_of_another_size_is_refused(picture: Path, tmp_path: Path, sentencepiece: TextTokenizer) -> None:
    with pytest.raises(DataError, match="is 1024, the run's is 0; .* or set data.max_image_side=1024"):
        _in_training(picture, tmp_path / "data", sentencepiece, 1024, 0)
