"""From raw records to a dataset folder.

The life of a record: parse (`vl_health.llava_json`) → pictures decoded, stripped of all metadata, re-encoded as PNG
(threads) → target images to VQ indices (one VQGAN batch per window) → tokens and mask (`text.templates`) → mmap files.
A record that cannot be used is skipped, counted by reason and listed; many in a row stop the work.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from tqdm import tqdm

from megatron_hgpt.data.dataset import describe_vocabulary
from megatron_hgpt.data.mmap_format import DatasetWriter
from megatron_hgpt.errors import ConfigError, DataError, SkipSample
from megatron_hgpt.files import printable, sha256_of
from megatron_hgpt.samples import IMAGE_TOKEN_ID, Sample
from megatron_hgpt.text.templates import encode_conversation, end_token_id, resolve_system_prompt
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary
from megatron_hgpt.vision.preprocess import load_image, shrink
from megatron_hgpt.vl_health import hf_parquet, llava_json

logger = logging.getLogger(__name__)


class ImageEncoder(Protocol):
    """What is used of a VQGAN."""

    num_codes: int
    num_indices: int

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """PIL to [3, R, R] in [-1, 1]."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, R, R] to int64 [n, num_indices]."""


@dataclass(kw_only=True, slots=True)
class PreprocessOptions:
    """How records become samples."""

    template: str
    system_prompt: str | None = None
    """None is the template's own."""
    num_indices: int = 1024
    """VQ indices of one image."""
    num_image_tokens: int = 576
    """Features of one image; with `max_seq_length` only used to count the samples that will be truncated."""
    max_seq_length: int = 2048
    """Tokens of one sample with its image features."""
    max_image_side: int = 0
    """`data.max_image_side`: larger input pictures are stored smaller; 0 keeps every size."""
    max_consecutive_skips: int = 100
    """Unusable records in a row that stop the work."""
    num_workers: int = 0
    """Threads that decode and encode pictures (Pillow releases the interpreter lock); 0 does it inline."""
    window: int = 32
    """Records handled together: one VQGAN batch, and the pictures in memory."""
    list_text: bool = False
    """Quote what skipped records say, and names of pictures, in skipped.jsonl, which lists only where they stand."""
    overwrite: bool = False
    progress_bar: bool = False


@dataclass(kw_only=True, slots=True)
class Input:
    """One file of records."""

    path: Path
    """.json, .jsonl or .parquet."""
    image_root: Path | None = None
    """Folder that image paths are relative to; None is the file's own."""
    source: str | None = None
    """Name of the data source in the statistics; None is the file's stem."""


@dataclass(kw_only=True, slots=True)
class _Prepared:
    """A record on its way: what is ready of it, or why it is skipped."""

    sample_id: str
    file: str
    number: int
    """Of the record in its file, from 0."""
    sample: Sample | None = None
    images: list[bytes] | None = None
    target: torch.Tensor | None = None
    skip: SkipSample | None = None


def preprocess(
    inputs: Sequence[Input],
    output: Path,
    *,
    tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    options: PreprocessOptions,
    vqgan: ImageEncoder | None = None,
    vqgan_folder: Path | None = None,
) -> dict[str, Any]:
    """Write the dataset folder `output`; the same input gives the same bytes, whatever the number of workers.

    Args:
        inputs: files of records, in order.
        output: folder to write; it appears only when it is complete.
        tokenizer, vocabulary: the model's.
        options: see there.
        vqgan: encodes target images; needed only where records give the image and not its indices.
        vqgan_folder: where it came from; the manifest keeps the sha256 of its last.ckpt.

    Returns:
        The manifest.

    Raises:
        DataError: an input cannot be read, too many records in a row are unusable, none is usable, a target image but
            no VQGAN, or `output` exists.
        ConfigError: tokenizer, vocabulary, template and VQGAN do not fit together.
    """
    _check(tokenizer, vocabulary, options, vqgan)
    description = {
        "tokenizer": {"sha256": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "template": {
            "name": options.template,
            "system_prompt": resolve_system_prompt(options.template, options.system_prompt),
        },
        "vocabulary": describe_vocabulary(vocabulary),
        "vq": _describe_vq(vocabulary, options, vqgan, vqgan_folder),
    }
    creation = {
        "inputs": [{"file": printable(item.path.name), "source": _source(item)} for item in inputs],
        "max_image_side": options.max_image_side,
        "max_seq_length": options.max_seq_length,
        "num_image_tokens": options.num_image_tokens,
    }
    lengths = _LengthCheck(options)
    with DatasetWriter(output, overwrite=options.overwrite) as writer:
        consecutive = 0
        for item in _prepare_all(inputs, vocabulary, options, vqgan):
            try:
                lengths.add(*_write(writer, item, tokenizer, vocabulary, options))
                consecutive = 0
            except SkipSample as error:
                where: dict[str, str | int] = {"file": item.file, "record": item.number}
                if options.list_text:
                    where["text"] = error.quote
                writer.skip(item.sample_id, error.reason, error.detail, **where)
                logger.debug("record %s skipped: %s", item.sample_id, error)
                consecutive += 1
                if consecutive >= options.max_consecutive_skips:
                    raise DataError(
                        f"{consecutive} unusable records in a row, the last one is {item.sample_id[:80]} ({error}); "
                        f"skipped so far: {writer.skips}; check the paths and the image root"
                    ) from error
        return writer.finish({**description, "creation": {**creation, **lengths.report()}})


def _prepare_all(
    inputs: Sequence[Input], vocabulary: Vocabulary, options: PreprocessOptions, vqgan: ImageEncoder | None
) -> Iterator[_Prepared]:
    """Every record in order, window by window, with its pictures and indices ready or the reason to skip it."""

    def prepare(job: tuple[Input, int, Any]) -> _Prepared:
        return _prepare(job, vocabulary, options, vqgan)

    records = _records(inputs)
    pool = ThreadPoolExecutor(options.num_workers) if options.num_workers else nullcontext()
    with pool as executor, tqdm(unit="record", disable=not options.progress_bar) as progress:
        run = map if executor is None else executor.map  # both keep the order
        while window := list(islice(records, options.window)):
            prepared = list(run(prepare, window))
            _encode_targets(prepared, vqgan)
            yield from prepared
            progress.update(len(window))


def _check(
    tokenizer: TextTokenizer, vocabulary: Vocabulary, options: PreprocessOptions, vqgan: ImageEncoder | None
) -> None:
    end_token_id(tokenizer, options.template)
    if tokenizer.vocab_size > vocabulary.text_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries, vocabulary.text_size is {vocabulary.text_size}: text "
            "and image tokens would share ids; set model.vocabulary.text_size to at least the tokenizer's size"
        )
    for name, wanted in (("num_codes", vocabulary.num_codes), ("num_indices", options.num_indices)):
        if vqgan is not None and getattr(vqgan, name) != wanted:
            raise ConfigError(f"vq.{name} is {wanted}, the VQGAN has {getattr(vqgan, name)}; set them alike")


def _describe_vq(
    vocabulary: Vocabulary, options: PreprocessOptions, vqgan: ImageEncoder | None, folder: Path | None
) -> dict[str, Any]:
    digest = sha256_of(folder / "last.ckpt") if vqgan is not None and folder is not None else None
    return {"sha256": digest, "num_codes": vocabulary.num_codes, "num_indices": options.num_indices}


def _source(item: Input) -> str:
    return printable(item.source if item.source is not None else item.path.stem)


def _records(inputs: Sequence[Input]) -> Iterator[tuple[Input, int, Any]]:
    """(file, number in the file, raw record) of every input, in order."""
    for item in inputs:
        read: Callable[[Path], Iterable[Any]] = llava_json.read_records
        if item.path.suffix == ".parquet":
            read = hf_parquet.read_records
        for number, record in enumerate(read(item.path)):
            yield item, number, record


def _prepare(
    job: tuple[Input, int, Any], vocabulary: Vocabulary, options: PreprocessOptions, vqgan: ImageEncoder | None
) -> _Prepared:
    """Everything of a record that a thread can do."""
    item, number, record = job
    root = item.path.parent if item.image_root is None else item.image_root
    default_id = f"{_source(item)}-{number}"
    sample_id = llava_json.record_id(record, default_id)
    prepared = _Prepared(sample_id=sample_id, file=printable(item.path.name), number=number)
    try:
        sample = llava_json.parse_record(
            record,
            image_root=root,
            num_codes=vocabulary.num_codes,
            num_indices=options.num_indices,
            default_id=default_id,
            source=_source(item),
        )
        if sample.target_image is not None:
            if vqgan is None:
                raise DataError(f"record {sample_id[:80]} has a target_image; set model.vq.path to encode it")
            prepared.target = vqgan.preprocess(load_image(sample.target_image))
        prepared.images = [_store(shrink(load_image(image), options.max_image_side)) for image in sample.images]
        prepared.sample = sample
    except SkipSample as error:
        # The record's own paths are relative; the root is this machine's business.
        quote = error.quote.replace(f"{os.path.abspath(root)}{os.sep}", "")
        prepared.target, prepared.skip = None, SkipSample(error.reason, error.detail, quote)
    return prepared


def _store(image: Image.Image) -> bytes:
    """PNG of the pixels alone: a fresh image carries no EXIF, text or colour profile."""
    buffer, bare = io.BytesIO(), Image.new("RGB", image.size)
    bare.paste(image)
    bare.save(buffer, format="PNG")
    return buffer.getvalue()


def _encode_targets(prepared: Sequence[_Prepared], vqgan: ImageEncoder | None) -> None:
    """Fill in the indices of the target images of a window, in one batch."""
    waiting = [item for item in prepared if item.target is not None]
    if not waiting or vqgan is None:
        return
    indices = vqgan.encode(torch.stack([item.target for item in waiting if item.target is not None])).tolist()
    for item, row in zip(waiting, indices, strict=True):
        assert item.sample is not None
        item.sample.target_indices, item.target = row, None


def _write(
    writer: DatasetWriter,
    item: _Prepared,
    tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    options: PreprocessOptions,
) -> tuple[list[int], list[bool]]:
    if item.skip is not None:
        raise item.skip
    assert item.sample is not None and item.images is not None
    tokens, loss_mask = encode_conversation(item.sample, tokenizer, options.template, vocabulary, options.system_prompt)
    sample = item.sample
    writer.add(
        sample_id=sample.sample_id,
        task=sample.task,
        tokens=tokens,
        loss_mask=loss_mask,
        images=item.images,
        source=sample.source,
    )
    return tokens, loss_mask


class _LengthCheck:
    """Counts the samples that the loader will have to truncate."""

    def __init__(self, options: PreprocessOptions) -> None:
        self._options = options
        self._num_longer = self._num_lost = 0

    def add(self, tokens: Sequence[int], loss_mask: Sequence[bool]) -> None:
        limit, length, kept = self._options.max_seq_length, 0, False
        for token, supervised in zip(tokens, loss_mask, strict=True):
            length += self._options.num_image_tokens if token == IMAGE_TOKEN_ID else 1
            kept = kept or (supervised and length <= limit)
        self._num_longer += length > limit
        self._num_lost += not kept

    def report(self) -> dict[str, int]:
        """The counts, with a warning where there are any."""
        if self._num_longer:
            logger.warning(
                "%d samples are longer than %d tokens and will be truncated when loaded; %d of them keep no supervised "
                "token and will be skipped",
                self._num_longer,
                self._options.max_seq_length,
                self._num_lost,
            )
        return {"num_longer_than_max_seq_length": self._num_longer, "num_without_supervised_token": self._num_lost}
