"""Preprocessing as a run's configuration wants it: its tokenizer, template, vocabulary and VQGAN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hgpt.errors import raise_problems

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from megatron_hgpt.config import ModelConfig, RunConfig
    from megatron_hgpt.vision.vqgan import VQGAN


def preprocess_problems(
    config: RunConfig, inputs: Sequence[str | Path], image_root: str | Path | None = None
) -> list[str]:
    """What would stop `preprocess_run` before its first record, all of it; nothing heavy is imported for that."""
    model = config.model
    folder, name = model.tokenizer or model.backbone, "model.tokenizer" if model.tokenizer else "model.backbone"
    problems = []
    if folder is None:
        problems.append("neither model.tokenizer nor model.backbone names a folder; set one of them")
    elif not Path(folder).is_dir():
        problems.append(f"{name}={folder} is not a folder")
    if model.vq.path is not None and not Path(model.vq.path).is_dir():
        problems.append(f"model.vq.path={model.vq.path} is not a folder")
    problems += [f"--input {path} is not a file; name one that exists" for path in inputs if not Path(path).is_file()]
    if image_root is not None and not Path(image_root).is_dir():
        problems.append(f"--image-root {image_root} is not a folder; name one that exists")
    return problems


def preprocess_run(
    config: RunConfig,
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    image_root: str | Path | None = None,
    source: str | None = None,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Write the dataset folder `output` for the model of `config`.

    Args:
        config: the run with its folders read (`load_resolved`).
        inputs: files of records: .json, .jsonl (LLaVA's schema) or .parquet.
        output: folder to write; it appears only when it is complete.
        image_root: folder of image paths; None takes each file's own.
        source: name of the data source in the statistics; None takes each file's name.
        device: of the VQGAN.
        options: fields of `PreprocessOptions`, e.g. num_workers=4.

    Returns:
        The manifest: counts, skipped records by reason, hashes.

    Raises:
        ConfigError: a file or folder that is not there (all in one message), no tokenizer, or one that does not fit
            the vocabulary, template or VQGAN.
        DataError: what `preprocess` refuses.
    """
    raise_problems(preprocess_problems(config, inputs, image_root))
    from megatron_hgpt.data.preprocess import Input, PreprocessOptions, preprocess
    from megatron_hgpt.text.templates import template_of
    from megatron_hgpt.text.tokenizer import TextTokenizer
    from megatron_hgpt.text.vocabulary import Vocabulary

    model = config.model
    folder = model.tokenizer or model.backbone
    assert folder is not None  # which is the first of the problems
    settings = PreprocessOptions(
        template=template_of(model),
        system_prompt=model.system_prompt,
        num_indices=model.vq.indices,
        # Without any word about the tower, CLIP ViT-L/14-336's.
        num_image_tokens=model.vision.num_image_tokens if model.vision.hf_config else 576,
        max_seq_length=model.max_seq_length,
        max_image_side=config.data.max_image_side,
        **options,
    )
    root = None if image_root is None else Path(image_root)
    return preprocess(
        [Input(path=Path(path), image_root=root, source=source) for path in inputs],
        Path(output),
        tokenizer=TextTokenizer.load(folder),
        vocabulary=Vocabulary.from_config(model),
        options=settings,
        vqgan=_load_vqgan(model, device),
        vqgan_folder=None if model.vq.path is None else Path(model.vq.path),
    )


class _OnDevice:
    """A VQGAN that takes and gives tensors of the CPU."""

    def __init__(self, vqgan: VQGAN, device: str) -> None:
        self._vqgan, self._device = vqgan, device
        self.num_codes, self.num_indices = vqgan.num_codes, vqgan.num_indices

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return self._vqgan.preprocess(image)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self._vqgan.encode(images.to(self._device)).cpu()


def _load_vqgan(model: ModelConfig, device: str) -> _OnDevice | None:
    if model.vq.path is None:
        return None
    from megatron_hgpt.vision.vqgan import VQGAN

    return _OnDevice(VQGAN.load(Path(model.vq.path), device), device)
