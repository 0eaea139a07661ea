"""Text and images from a HealthGPT model: greedy or sampled, with a KV cache, under any tensor-parallel size.

Life of a request:

1. `Prompt` → token ids up to the assistant header (`text.templates.encode_prompt`; generation adds `<start_index>`).
2. Image features are spliced in, as in training; requests of equal length share a batch.
3. One prefill pass fills the KV cache, then one token per pass.
4. Text ends at the template's end token. An image is constrained by default: only `<idx_*>` for exactly
   `num_indices` steps, so the number of indices is always right; `constrained=False` lets the model decide.

Every tensor-parallel rank must call the same methods in the same order; each gets the same result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from megatron_hgpt.config import RunConfig
from megatron_hgpt.data.loader import splice_images
from megatron_hgpt.errors import DataError
from megatron_hgpt.samples import Task
from megatron_hgpt.text.templates import encode_prompt, end_token_id, template_of
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.vision.preprocess import clip_preprocess, load_image, shrink

if TYPE_CHECKING:
    from megatron_hgpt.model.healthgpt import HealthGPT


@dataclass(kw_only=True, slots=True)
class Prompt:
    """One request."""

    task: Task
    question: str
    """User text with one ``<image>`` per image."""
    images: list[Any] = field(default_factory=list)
    """Paths, encoded bytes or PIL images."""


@dataclass(kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches top_p."""
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class EncodedPrompt:
    """A request with its image features in place."""

    task: Task
    tokens: torch.Tensor
    """int64 [t]: 0 at image features."""
    image_mask: torch.Tensor
    """bool [t]."""
    pixel_values: torch.Tensor
    """float32 [n, 3, height, width]."""


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The next id [b] from logits [b, V]; -inf marks what may not be chosen."""
    if sampling.temperature <= 0.0:
        return logits.argmax(-1)
    logits = logits.float().cpu() / sampling.temperature
    if sampling.top_k > 0:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.scatter(-1, order, ordered.masked_fill(beyond, float("-inf")))
    # Drawn on the CPU from a seeded generator: every tensor-parallel rank draws the same token.
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@contextlib.contextmanager
def inference_mode(model: Any) -> Iterator[None]:
    """Evaluation mode without sequence parallelism, which a single decoded token cannot be sharded over."""
    was_training = model.training
    sharded = [module for module in model.modules() if getattr(module, "sequence_parallel", False)]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    sharded_configs = [config for config in configs.values() if getattr(config, "sequence_parallel", False)]
    model.eval()
    for target in (*sharded, *sharded_configs):
        target.sequence_parallel = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for target in (*sharded, *sharded_configs):
            target.sequence_parallel = True
        model.train(was_training)


class Generator:
    """Answers and draws.

    Args:
        model: a `HealthGPT` (not wrapped in DDP).
        tokenizer: the text tokenizer it was trained with.
        template: chat template name.
        num_indices: VQ indices of one image.
        system_prompt: the template's system message; None is the template's own.
        max_image_side: `data.max_image_side` of the run: larger pictures are shrunk to it, as its datasets' were.
        batch_size: requests decoded together at most.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TextTokenizer,
        *,
        template: str,
        num_indices: int,
        system_prompt: str | None = None,
        max_image_side: int = 0,
        batch_size: int = 16,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.template, self.system_prompt = template, system_prompt
        self.num_indices, self.batch_size, self.max_image_side = num_indices, batch_size, max_image_side
        self.vocabulary = model.vocabulary
        self.end_id = end_token_id(tokenizer, template)

    @classmethod
    def of(cls, model: HealthGPT, tokenizer: TextTokenizer, config: RunConfig) -> Generator:
        """As `config`'s run was trained: its template, system message, indices of a picture and picture size."""
        return cls(
            model,
            tokenizer,
            template=template_of(config.model),
            num_indices=config.model.vq.indices,
            system_prompt=config.model.system_prompt,
            max_image_side=config.data.max_image_side,
        )

    def answer(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 128, sampling: Sampling | None = None
    ) -> list[str]:
        """Text answers, in the order of `prompts`; the end token is not part of the text."""
        allowed = torch.zeros(self.vocabulary.padded_size, dtype=torch.bool)
        allowed[: self.vocabulary.text_size] = True
        encoded = [self.encode(prompt) for prompt in prompts]
        ids = self._generate(encoded, max_new_tokens, allowed, {self.end_id}, sampling or Sampling())
        return [self.tokenizer.decode(row).strip() for row in ids]

    def draw(
        self, prompts: Sequence[Prompt], *, sampling: Sampling | None = None, constrained: bool = True
    ) -> list[list[int]]:
        """VQ indices of one image per prompt, raster order; exactly `num_indices` of them when constrained."""
        return self.draw_encoded(
            [self.encode(prompt) for prompt in prompts], sampling=sampling, constrained=constrained
        )

    def draw_encoded(
        self, prompts: Sequence[EncodedPrompt], *, sampling: Sampling | None = None, constrained: bool = True
    ) -> list[list[int]]:
        """As `draw`, for prompts that end with `<start_index>` already."""
        allowed = torch.zeros(self.vocabulary.padded_size, dtype=torch.bool)
        allowed[self.vocabulary.first_code_id : self.vocabulary.end_id] = True
        stop: set[int] = set()
        num_steps = self.num_indices
        if not constrained:
            allowed[: self.vocabulary.size] = True
            stop = {self.vocabulary.end_id, self.end_id}
            num_steps += 1
        ids = self._generate(prompts, num_steps, allowed, stop, sampling or Sampling())
        return [self.vocabulary.decode_ids(row) for row in ids]

    def draw_images(self, prompts: Sequence[Prompt], vqgan: Any, **options: Any) -> list[Any]:
        """PIL images for the prompts.

        Raises:
            DataError: free decoding gave another number of indices than an image has.
        """
        rows = self.draw(prompts, **options)
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) != self.num_indices:
                raise DataError(
                    f"{prompt.question[:60]!r}: free decoding gave {len(row)} image indices, an image has "
                    f"{self.num_indices}; decode with constrained=True"
                )
        if not rows:
            return []
        decoded = []
        for start in range(0, len(rows), self.batch_size):
            indices = torch.tensor(rows[start : start + self.batch_size], device=next(vqgan.parameters()).device)
            with torch.inference_mode():
                decoded += [vqgan.to_pil(image) for image in vqgan.decode(indices)]
        return decoded

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Tokens up to the answer, with image features spliced in.

        Raises:
            SkipSample: an image cannot be read, or their number differs from the placeholders'.
        """
        ids = encode_prompt(
            prompt.question,
            prompt.task,
            self.tokenizer,
            self.template,
            self.vocabulary,
            system_prompt=self.system_prompt,
            num_images=len(prompt.images),
        )
        images = [shrink(load_image(image), self.max_image_side) for image in prompt.images]
        return self.splice(prompt.task, torch.tensor(ids), images)

    def splice(self, task: Task, tokens: torch.Tensor, images: Sequence[Any]) -> EncodedPrompt:
        """A prompt from token ids [t] (IMAGE_TOKEN_ID once per image) and RGB images."""
        tower = self.model.tower
        spliced, image_mask = splice_images(tokens, tower.num_image_tokens)
        pixels = [clip_preprocess(image, tower.image_size) for image in images]
        empty = torch.empty(0, 3, tower.image_size, tower.image_size)
        return EncodedPrompt(
            task=task, tokens=spliced, image_mask=image_mask, pixel_values=torch.stack(pixels) if pixels else empty
        )

    def _generate(
        self,
        prompts: Sequence[EncodedPrompt],
        max_new_tokens: int,
        allowed: torch.Tensor,
        stop: set[int],
        sampling: Sampling,
    ) -> list[list[int]]:
        """New ids per prompt, without the stop id."""
        results: list[list[int]] = [[] for _ in prompts]
        by_shape: dict[tuple[Task, int], list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_shape.setdefault((prompt.task, len(prompt.tokens)), []).append(i)
        with inference_mode(self.model):
            for members in by_shape.values():
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    rows = self._generate_batch([prompts[i] for i in batch], max_new_tokens, allowed, stop, sampling)
                    for i, row in zip(batch, rows, strict=True):
                        results[i] = row
        return results

    def _generate_batch(
        self,
        prompts: Sequence[EncodedPrompt],
        max_new_tokens: int,
        allowed: torch.Tensor,
        stop: set[int],
        sampling: Sampling,
    ) -> list[list[int]]:
        from megatron.core.inference.contexts import StaticInferenceContext

        device = next(self.model.parameters()).device
        task = prompts[0].task
        tokens = torch.stack([prompt.tokens for prompt in prompts]).to(device)  # [b, t]
        image_mask: torch.Tensor | None = torch.stack([prompt.image_mask for prompt in prompts]).to(device)
        pixels: torch.Tensor | None = torch.cat([prompt.pixel_values for prompt in prompts]).to(device)
        num_rows, prompt_length = tokens.shape
        context = StaticInferenceContext(num_rows, prompt_length + max_new_tokens)
        forbidden = ~allowed.to(device)
        generator = torch.Generator().manual_seed(sampling.seed)
        results: list[list[int]] = [[] for _ in range(num_rows)]
        finished = [False] * num_rows
        position = 0
        for _ in range(max_new_tokens):
            logits = self.model.decode(tokens, task, context, position, image_mask=image_mask, pixel_values=pixels)
            context.increment_sequence_len_offset(tokens.shape[1])
            position += tokens.shape[1]
            chosen = choose(logits[:, -1].masked_fill(forbidden, float("-inf")), sampling, generator).to(device)
            for i, token in enumerate(chosen.tolist()):
                finished[i] = finished[i] or token in stop
                if not finished[i]:
                    results[i].append(token)
            if all(finished):
                break
            context.enable_decode_mode()
            tokens, image_mask, pixels = chosen.unsqueeze(1), None, None
        return results
