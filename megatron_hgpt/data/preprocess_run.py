"""Preprocessing as a run's configuration wants it: its tokenizer, template, vocabulary and VQGAN."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hgpt.data.preprocess import Input, PreprocessOptions, preprocess
from megatron_hgpt.errors import ConfigError
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from megatron_hgpt.config import ModelConfig, RunConfig
    from megatron_hgpt.vision.vqgan import VQGAN


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
        config: the run; of its sections only `model` counts.
        inputs: files of records: .json, .jsonl (LLaVA's schema) or .parquet.
        output: folder to write; it appears only when it is complete.
        image_root: folder of image paths; None takes each file's own.
        source: name of the data source in the statistics; None takes each file's name.
        device: of the VQGAN.
        options: fields of `PreprocessOptions`, e.g. num_workers=4.

    Returns:
        The manifest: counts, skipped records by reason, hashes.

    Raises:
        ConfigError: no tokenizer, or one that does not fit the vocabulary, template or VQGAN.
        DataError: what `preprocess` refuses.
    """
    model = config.model
    folder = model.tokenizer or model.backbone
    if folder is None:
        raise ConfigError("neither model.tokenizer nor model.backbone names a folder; set one of them")
    settings = PreprocessOptions(
        template=model.template,
        system_prompt=model.system_prompt,
        num_indices=model.vq.num_indices,
        num_image_tokens=_num_image_tokens(model),
        max_seq_length=model.max_seq_length,
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


def _num_image_tokens(model: ModelConfig) -> int:
    """Patches of the tower, CLIP ViT-L/14-336's where the configuration does not say."""
    values = dict(model.vision.hf_config)
    if model.vision.tower is not None and (Path(model.vision.tower) / "config.json").is_file():
        values = json.loads((Path(model.vision.tower) / "config.json").read_text())
        values = values.get("vision_config", values)
    return (int(values.get("image_size", 336)) // int(values.get("patch_size", 14))) ** 2
