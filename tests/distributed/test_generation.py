"""Decoding with a KV cache under tensor parallelism: equal to full forward passes, and the right number of indices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hgpt.config import ParallelConfig
from megatron_hgpt.samples import Task
from megatron_hgpt.testing.distributed import run_ranks
from megatron_hgpt.testing.models import IMAGE_SIZE, NUM_CODES, NUM_INDICES, tiny_config, write_backbone

NEW_TOKENS = 6


class FakeVQGAN(torch.nn.Module):
    """Paints each index as a grey level: decoding is not what is tested here."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        side = int(indices.shape[1] ** 0.5)
        return (indices.float().view(-1, 1, side, side) / NUM_CODES).expand(-1, 3, -1, -1)

    @staticmethod
    def to_pil(image: torch.Tensor) -> Any:
        from PIL import Image

        return Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy())


def greedy_without_cache(model: Any, prompt: Any, allowed: torch.Tensor) -> list[int]:
    """One full forward pass per new token, through a fresh cache that only ever sees whole prompts."""
    from megatron.core.inference.contexts import StaticInferenceContext

    tokens, mask = prompt.tokens.clone(), prompt.image_mask.clone()
    new = []
    for _ in range(NEW_TOKENS):
        context = StaticInferenceContext(1, len(tokens))
        logits = model.decode(
            tokens[None], prompt.task, context, 0, image_mask=mask[None], pixel_values=prompt.pixel_values
        )
        new.append(int(logits[0, -1].masked_fill(~allowed, float("-inf")).argmax()))
        tokens, mask = torch.cat([tokens, torch.tensor(new[-1:])]), torch.cat([mask, torch.tensor([False])])
    return new


def generate(backbone: Path, folder: Path, parallel: ParallelConfig) -> dict[str, Any]:
    from megatron_hgpt import distributed

    context = distributed.initialize(parallel, seed=1)
    from PIL import Image

    from megatron_hgpt.build import build_model
    from megatron_hgpt.demo.tokenizers import make_tiny_tokenizer
    from megatron_hgpt.errors import DataError
    from megatron_hgpt.inference.generator import Generator, Prompt, Sampling, inference_mode
    from megatron_hgpt.testing.models import make_b_nonzero
    from megatron_hgpt.text.tokenizer import TextTokenizer

    tokenizer_folder = folder / f"tokenizer{context.rank}"
    make_tiny_tokenizer(tokenizer_folder, ["what is this image of a brain"], 330)
    tokenizer = TextTokenizer.load(tokenizer_folder)
    config = tiny_config(backbone, folder, parallel=parallel)
    model = build_model(config, context.device)
    make_b_nonzero(model)
    generator = Generator(model, tokenizer, template="phi3_instruct", num_indices=NUM_INDICES, batch_size=2)
    pictures = [Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (level, 90, 10)) for level in (0, 100, 250)]
    result: dict[str, Any] = {}
    # The tiny tokenizer has more ids than the tiny model: fold prompts into the model's range.
    for task in Task:
        prompts = []
        for picture in pictures:
            prompt = generator.encode(Prompt(task=task, question="<image>\nwhat is this", images=[picture]))
            prompt.tokens %= model.vocabulary.text_size
            prompts.append(prompt)
        allowed = torch.zeros(model.vocabulary.padded_size, dtype=torch.bool)
        allowed[: model.vocabulary.text_size] = True
        cached = generator._generate(prompts, NEW_TOKENS, allowed, set(), Sampling())
        with inference_mode(model):
            plain = [greedy_without_cache(model, prompt, allowed) for prompt in prompts]
        result[task.value] = (cached, plain)
        if task is Task.GENERATION:
            result["constrained"] = generator.draw_encoded(prompts)
            result["sampled"] = generator.draw_encoded(prompts, sampling=Sampling(temperature=2.0, top_k=9, seed=3))
            result["free"] = [len(row) for row in generator.draw_encoded(prompts, constrained=False)]
            generator.draw = lambda *_args, **_options: [[0] * (NUM_INDICES - 1)]  # type: ignore[method-assign]
            with pytest.raises(DataError, match=f"gave {NUM_INDICES - 1} image indices"):
                generator.draw_images([Prompt(task=task, question="draw")], FakeVQGAN(), constrained=False)
            generator.draw = lambda *_args, **_options: [[1, 2, 3, 4]]  # type: ignore[method-assign]
            (image,) = generator.draw_images([Prompt(task=task, question="draw")], FakeVQGAN())
            result["size"] = image.size
    result["training restored"] = model.training and model.config.sequence_parallel == parallel.sequence_parallel
    return result


@pytest.mark.parametrize("parallel", [
    ParallelConfig(),
    ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
], ids=["TP1", "TP2 + SP"])  # fmt: skip
def test_cached_decoding_equals_full_passes_on_every_rank(parallel: ParallelConfig, tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "backbone")
    ranks = run_ranks(generate, parallel.tensor_model_parallel_size, backbone, tmp_path, parallel)
    for result in ranks:
        assert result == ranks[0]
    (result, *_) = ranks
    for task in Task:
        cached, plain = result[task.value]
        assert cached == plain
        assert len({tuple(row) for row in cached}) > 1, "different pictures must matter"
    for name in ("constrained", "sampled"):
        assert [len(row) for row in result[name]] == [NUM_INDICES] * 3
        assert all(0 <= index < NUM_CODES for row in result[name] for index in row)
    assert result["constrained"] != result["sampled"]
    assert all(length <= NUM_INDICES + 1 for length in result["free"])
    assert result["size"] == (2, 2)
    assert result["training restored"]
