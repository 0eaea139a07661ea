"""From stored samples to a padded micro-batch: image features get their places, labels are shifted, the end is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from megatron_hgpt.errors import ConfigError, SkipSample
from megatron_hgpt.rounding import round_up
from megatron_hgpt.samples import IGNORE_INDEX, IMAGE_TOKEN_ID, EncodedSample, MicroBatch
from megatron_hgpt.vision.preprocess import clip_preprocess, load_image


@dataclass(kw_only=True, slots=True)
class ExpandedSample:
    """One sample with its image features in place and its pictures ready for the tower."""

    sample_id: str
    tokens: torch.Tensor
    """int64 [t]: 0 at image features."""
    labels: torch.Tensor
    """int64 [t]: the id to predict at this position."""
    image_mask: torch.Tensor
    """bool [t]."""
    pixel_values: list[torch.Tensor]
    """float32 [3, H, W] of each picture whose features are in `tokens`; empty where they come from the cache."""
    features: list[torch.Tensor]
    """[p, c] of each such picture from the feature cache; empty without one."""
    is_truncated: bool


def splice_images(tokens: torch.Tensor, num_image_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace each `IMAGE_TOKEN_ID` by `num_image_tokens` zeros.

    Args:
        tokens: int64 [t].
        num_image_tokens: features of one image.

    Returns:
        tokens int64 [t'] and the image mask bool [t'], t' = t + n * (num_image_tokens - 1).
    """
    is_image = tokens == IMAGE_TOKEN_ID
    repeats = torch.where(is_image, num_image_tokens, 1)
    image_mask = is_image.repeat_interleave(repeats)
    return tokens.repeat_interleave(repeats).masked_fill(image_mask, 0), image_mask


def expand_sample(
    sample: EncodedSample, *, num_image_tokens: int, image_size: int, max_seq_length: int
) -> ExpandedSample:
    """Splice, cut to `max_seq_length` (spec section 3) and shift the labels.

    An image that would be cut in the middle is left out with everything after it: features come whole or not at all.

    Raises:
        SkipSample: ``no_supervised_token``: nothing to learn is left; or a picture cannot be decoded.
    """
    tokens, image_mask = splice_images(sample.tokens, num_image_tokens)
    repeats = torch.where(sample.tokens == IMAGE_TOKEN_ID, num_image_tokens, 1)
    loss_mask = sample.loss_mask.repeat_interleave(repeats) & ~image_mask
    length = min(len(tokens), max_seq_length)
    num_images, cut = divmod(int(image_mask[:length].sum()), num_image_tokens)
    if cut:
        length = int(image_mask.nonzero()[num_images * num_image_tokens])
    is_truncated = length < len(tokens)
    tokens, image_mask, loss_mask = tokens[:length], image_mask[:length], loss_mask[:length]
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[:-1] = torch.where(loss_mask[1:], tokens[1:], IGNORE_INDEX)
    if not bool((labels != IGNORE_INDEX).any()):
        detail = f"sample {sample.sample_id}: no supervised token within {max_seq_length} tokens"
        raise SkipSample("no_supervised_token", detail)
    return ExpandedSample(
        sample_id=sample.sample_id,
        tokens=tokens,
        labels=labels,
        image_mask=image_mask,
        pixel_values=[clip_preprocess(load_image(image), image_size) for image in sample.images[:num_images]],
        features=sample.features[:num_images],
        is_truncated=is_truncated,
    )


def collate(
    samples: Sequence[tuple[EncodedSample, ExpandedSample]], *, image_size: int, pad_to_multiple: int = 1
) -> MicroBatch:
    """One micro-batch, padded on the right to the longest sample, rounded up to `pad_to_multiple`.

    Args:
        samples: of one task, stored and expanded.
        image_size: height and width of the tower's input.
        pad_to_multiple: sequence parallelism needs a multiple of the tensor-parallel size.

    Raises:
        ConfigError: `samples` is empty or mixes tasks.
    """
    tasks = {stored.task for stored, _ in samples}
    if len(tasks) != 1:
        raise ConfigError(f"a micro-batch needs samples of one task, got {sorted(task.value for task in tasks)}")
    rows = [expanded for _, expanded in samples]
    length = round_up(max(len(row.tokens) for row in rows), pad_to_multiple)

    def stack(parts: list[torch.Tensor], fill: int) -> torch.Tensor:
        padded = [torch.nn.functional.pad(part, (0, length - len(part)), value=fill) for part in parts]
        return torch.stack(padded)

    labels = stack([row.labels for row in rows], IGNORE_INDEX)
    return MicroBatch(
        task=tasks.pop(),
        tokens=stack([row.tokens for row in rows], 0),
        labels=labels,
        position_ids=torch.arange(length).repeat(len(rows), 1),
        image_mask=stack([row.image_mask for row in rows], 0),
        pixel_values=_pixels(rows, image_size),
        sample_ids=[row.sample_id for row in rows],
        num_supervised_tokens=int((labels != IGNORE_INDEX).sum()),
        num_content_tokens=sum(len(row.tokens) for row in rows),
        image_features=_features(rows),
    )


def collate_packed(
    samples: Sequence[tuple[EncodedSample, ExpandedSample]], *, image_size: int, pad_to_multiple: int = 1
) -> MicroBatch:
    """One row that holds samples of either task one after another; no token attends to another sample.

    Args:
        samples: stored and expanded, at least one.
        image_size: height and width of the tower's input.
        pad_to_multiple: the row is padded on the right to a multiple of it.
    """
    rows = [expanded for _, expanded in samples]
    tasks = [stored.task for stored, _ in samples]
    num_content_tokens = sum(len(row.tokens) for row in rows)
    length = round_up(num_content_tokens, pad_to_multiple)
    starts = [0, *accumulate(len(row.tokens) for row in rows[:-1])]
    boundaries = (*starts, length)
    spans = [end - start for start, end in pairwise(boundaries)]

    def join(parts: list[torch.Tensor], fill: int) -> torch.Tensor:
        return torch.nn.functional.pad(torch.cat(parts), (0, length - num_content_tokens), value=fill).unsqueeze(0)

    is_mixed = len(set(tasks)) > 1
    image_tasks = tuple(task for task, row in zip(tasks, rows, strict=True) for _ in (row.pixel_values or row.features))
    codes = torch.tensor([task.code for task in tasks], dtype=torch.uint8)
    labels = join([row.labels for row in rows], IGNORE_INDEX)
    return MicroBatch(
        task=None if is_mixed else tasks[0],
        tokens=join([row.tokens for row in rows], 0),
        labels=labels,
        position_ids=torch.cat([torch.arange(span) for span in spans]).unsqueeze(0),
        image_mask=join([row.image_mask for row in rows], 0),
        pixel_values=_pixels(rows, image_size),
        image_features=_features(rows),
        image_tasks=image_tasks if is_mixed else (),
        token_tasks=codes.repeat_interleave(torch.tensor(spans)).unsqueeze(0) if is_mixed else None,
        boundaries=boundaries,
        sample_ids=[row.sample_id for row in rows],
        num_supervised_tokens=int((labels != IGNORE_INDEX).sum()),
        num_content_tokens=num_content_tokens,
    )


def _pixels(rows: Sequence[ExpandedSample], image_size: int) -> torch.Tensor:
    """All pictures [n, 3, image_size, image_size], in order."""
    pixels = [picture for row in rows for picture in row.pixel_values]
    return torch.stack(pixels) if pixels else torch.empty(0, 3, image_size, image_size)


def _features(rows: Sequence[ExpandedSample]) -> torch.Tensor | None:
    """Cached features [n, p, c] of all pictures, in order; None without a cache."""
    features = [picture for row in rows for picture in row.features]
    return torch.stack(features) if features else None
