"""Preprocessed samples of one folder, checked against the model that is to be trained on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_hgpt.data.feature_cache import FeatureCache
from megatron_hgpt.data.mmap_format import SKIPPED, DatasetReader
from megatron_hgpt.errors import DataError, SkipSample
from megatron_hgpt.files import Json
from megatron_hgpt.samples import IMAGE_TOKEN_ID, TASKS, EncodedSample
from megatron_hgpt.text.templates import resolve_system_prompt
from megatron_hgpt.text.vocabulary import Vocabulary


def describe_vocabulary(vocabulary: Vocabulary) -> dict[str, int]:
    """What the manifest stores of a vocabulary."""
    return {
        "text_size": vocabulary.text_size,
        "num_codes": vocabulary.num_codes,
        "start_id": vocabulary.start_id,
        "end_id": vocabulary.end_id,
        "size": vocabulary.size,
    }


def manifest_problems(
    folder: Path,
    manifest: dict[str, Any],
    *,
    vocabulary: Vocabulary,
    tokenizer_hash: str | None,
    template: str,
    system_prompt: str | None,
    num_indices: int | None,
    max_image_side: int,
) -> Iterator[str]:
    """Why a dataset does not fit a run: what its manifest records and the run has otherwise; arguments of `VLDataset`.

    A `tokenizer_hash` of None leaves the tokenizer unchecked: its hash takes seconds.
    """
    written, vq = manifest.get("template", {}), manifest.get("vq")
    side = manifest.get("creation", {}).get("max_image_side", 0)
    prompt = resolve_system_prompt(template, system_prompt)
    pairs: list[tuple[str, Any, Any, str | None]] = [
        ("template", written.get("name"), template, "model.template"),
        ("system prompt", written.get("system_prompt"), prompt, None),
        ("largest side of pictures (0: any)", side, max_image_side, "data.max_image_side"),
    ]
    if tokenizer_hash is not None:
        pairs.insert(0, ("tokenizer (sha256)", manifest.get("tokenizer", {}).get("sha256"), tokenizer_hash, None))
    for name, value in describe_vocabulary(vocabulary).items():
        pairs.append((f"vocabulary {name}", manifest.get("vocabulary", {}).get(name), value, None))
    if num_indices is not None and vq:
        pairs.append(("VQ indices per image", vq.get("num_indices"), num_indices, None))
    for what, found, wanted, field in pairs:
        if found != wanted:
            otherwise = "correct the configuration" if field is None else f"set {field}={found}"
            yield (
                f"{folder}: {what} of the dataset is {found!r}, the run's is {wanted!r}; write the dataset again with "
                f"this run's configuration (hgpt preprocess), or {otherwise}"
            )
            return  # the others mostly follow from the first


class VLDataset:
    """Map-style dataset over a folder written by `hgpt preprocess`.

    Args:
        folder: the dataset.
        vocabulary: the model's.
        tokenizer_hash: `TextTokenizer.hash` of the model's tokenizer.
        template: the model's chat template.
        system_prompt: the model's system message; None is the template's own.
        num_indices: VQ indices of one image; None leaves it unchecked.
        max_image_side: `data.max_image_side` of the run, to which larger pictures must have been shrunk.
        features: its feature cache; samples then carry features and no picture is decoded.
        verify_checksums: compare the sha256 of every file (reads all of it); sizes and indices are always compared.

    Raises:
        DataError: the folder is damaged, or was made for another tokenizer, vocabulary, template or system message.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vocabulary: Vocabulary,
        tokenizer_hash: str,
        template: str,
        system_prompt: str | None = None,
        num_indices: int | None = None,
        max_image_side: int = 0,
        features: FeatureCache | None = None,
        verify_checksums: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self._reader = DatasetReader(self.folder, verify_checksums=verify_checksums)
        manifest = self._reader.manifest
        self._vocabulary, self._features = vocabulary, features
        for problem in manifest_problems(
            self.folder,
            manifest,
            vocabulary=vocabulary,
            tokenizer_hash=tokenizer_hash,
            template=template,
            system_prompt=system_prompt,
            num_indices=num_indices,
            max_image_side=max_image_side,
        ):
            raise DataError(problem)

    @property
    def manifest(self) -> Json:
        """Content of manifest.json."""
        return self._reader.manifest

    @property
    def digest(self) -> str:
        """Tells these samples from any others: of the checksums that the manifest lists, without what was skipped."""
        files = {name: entry["sha256"] for name, entry in self.manifest["files"].items() if name != SKIPPED}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def tasks(self) -> NDArray[np.uint8]:
        """uint8 [n]: `Task.code` of each sample."""
        return self._reader.tasks

    def lengths(self, num_image_tokens: int) -> NDArray[np.int64]:
        """int64 [n]: tokens of each sample once every image stands for `num_image_tokens`."""
        return self._reader.num_tokens + self._reader.images_per_sample * (num_image_tokens - 1)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> EncodedSample:
        """One sample with its pictures as they are stored, or their features from the cache.

        Raises:
            SkipSample: the sample changed since it was written, or tokens, mask and pictures do not fit
                (``corrupt_sample``); or what `FeatureCache.read` skips.
            DataError: a picture is not in the feature cache.
        """
        sample_id = self._reader.sample_id(index)
        tokens = torch.from_numpy(self._reader.tokens(index).astype(np.int64))
        loss_mask = torch.from_numpy(self._reader.loss_mask(index).astype(np.bool_))
        numbers, task = self._reader.image_numbers(index), TASKS[int(self._reader.tasks[index])]
        images = self._reader.images(index) if self._features is None else []
        self._reader.check(index, images if self._features is None else None)
        is_image = tokens == IMAGE_TOKEN_ID
        is_known = (tokens >= 0) & (tokens < self._vocabulary.size)
        if (
            len(tokens) != len(loss_mask)
            or int(is_image.sum()) != len(numbers)
            or not bool((is_image | is_known).all())
        ):
            raise SkipSample("corrupt_sample", f"{self.folder}: sample {index} ({sample_id}) does not fit together")
        return EncodedSample(
            sample_id=sample_id,
            task=task,
            tokens=tokens,
            loss_mask=loss_mask,
            images=list(images),
            features=self._features.read(numbers, task) if self._features is not None else [],
        )
