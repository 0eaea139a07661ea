"""Pictures drawn while training: prompts of the dataset with their targets, side by side with what the model draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from megatron_hgpt.config import RunConfig
from megatron_hgpt.data.dataset import VLDataset
from megatron_hgpt.distributed import DistributedContext
from megatron_hgpt.errors import SkipSample
from megatron_hgpt.hooks import TrainState
from megatron_hgpt.inference.generator import EncodedPrompt, Generator
from megatron_hgpt.samples import EncodedSample, Task
from megatron_hgpt.text.templates import template_of
from megatron_hgpt.text.vocabulary import Vocabulary
from megatron_hgpt.vision.preprocess import load_image

if TYPE_CHECKING:
    from megatron_hgpt.model.healthgpt import HealthGPT
    from megatron_hgpt.text.tokenizer import TextTokenizer


def image_sampler(
    config: RunConfig, model: HealthGPT, tokenizer: TextTokenizer, context: DistributedContext
) -> Callable[[TrainState], list[tuple[str, Image.Image]]] | None:
    """A function that draws the same few prompts each time; None where no dataset holds a generation sample.

    Prompts come from the validation folders, or from the training ones where there are none.
    """
    from megatron_hgpt.vision.vqgan import VQGAN

    samples = _generation_samples(config, tokenizer.hash)
    if not samples:
        return None
    vqgan = VQGAN.load(Path(str(config.model.vq.path)), context.device)
    generator = Generator.of(model, tokenizer, config)

    def decode(indices: list[int]) -> Image.Image:
        with torch.inference_mode():
            return vqgan.to_pil(vqgan.decode(torch.tensor([indices], device=context.device))[0])

    def sample_images(_state: TrainState) -> list[tuple[str, Image.Image]]:
        prompts = [_prompt(sample, generator) for sample in samples]
        rows = generator.draw_encoded(prompts)
        pictures = []
        for sample, row in zip(samples, rows, strict=True):
            target = generator.vocabulary.decode_ids(sample.tokens.tolist())
            pictures.append(
                (f"{sample.sample_id}: input, target, drawn", _row(sample.images, decode(target), decode(row)))
            )
        return pictures

    return sample_images


def _generation_samples(config: RunConfig, tokenizer_hash: str) -> list[EncodedSample]:
    chosen: list[EncodedSample] = []
    for folder in config.data.validation or config.data.train:
        dataset = VLDataset(
            folder,
            vocabulary=Vocabulary.from_config(config.model),
            tokenizer_hash=tokenizer_hash,
            template=template_of(config.model),
            system_prompt=config.model.system_prompt,
            max_image_side=config.data.max_image_side,
        )
        for index in (dataset.tasks == Task.GENERATION.code).nonzero()[0]:
            if len(chosen) == config.logging.num_sample_images:
                return chosen
            with contextlib.suppress(SkipSample):  # training counts it
                sample = dataset[int(index)]
                sample.images = [load_image(image) for image in sample.images]
                chosen.append(sample)
    return chosen


def _prompt(sample: EncodedSample, generator: Generator) -> EncodedPrompt:
    """The stored tokens up to and including `<start_index>`."""
    start = int((sample.tokens == generator.vocabulary.start_id).nonzero()[0, 0])
    return generator.splice(sample.task, sample.tokens[: start + 1], sample.images)  # decoded above


def _row(inputs: Sequence[bytes | Image.Image], target: Image.Image, drawn: Image.Image) -> Image.Image:
    pictures = [*(load_image(image).resize(target.size) for image in inputs), target, drawn]
    row = Image.new("RGB", (target.width * len(pictures), target.height))
    for i, picture in enumerate(pictures):
        row.paste(picture, (i * target.width, 0))
    return row
