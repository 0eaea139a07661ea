#!/usr/bin/env python
"""Write the dataset folder that training reads from VL-Health records and their pictures.

    python tools/preprocess_vl_health.py --config run.yaml --input train.json --image-root images --output data/train

Inputs: .json, .jsonl (LLaVA-style records) or .parquet (Hugging Face). Tokenizer, template, vocabulary and VQGAN come
from the run's configuration, so that the dataset fits the model that is trained on it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hgpt.config import ModelConfig
from megatron_hgpt.config_io import preset_names
from megatron_hgpt.data.preprocess import Input, PreprocessOptions, preprocess
from megatron_hgpt.errors import ConfigError, HealthGPTError
from megatron_hgpt.model_folders import load_resolved
from megatron_hgpt.text.templates import template_of
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary


def build_parser() -> argparse.ArgumentParser:
    """The arguments; overrides of the configuration follow them."""
    parser = argparse.ArgumentParser(
        description="Write a dataset folder from VL-Health records.",
        epilog="key.sub=value overrides of the configuration follow, e.g. model.template=plain",
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help=".json, .jsonl, .parquet")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="dataset folder to write")
    parser.add_argument("--image-root", type=Path, metavar="FOLDER", help="of image paths (default: each file's)")
    parser.add_argument("--config", metavar="FILE", help="YAML run configuration, for its section `model`")
    parser.add_argument("--preset", choices=preset_names(), help="a model that lies beneath the file")
    parser.add_argument("--source", help="name of the source in the statistics (default: each file's name)")
    parser.add_argument("--workers", type=int, default=0, help="threads that decode pictures (default: 0, inline)")
    parser.add_argument("--window", type=int, default=32, help="records handled together, also the VQGAN's batch")
    parser.add_argument("--device", default="cpu", help="device of the VQGAN")
    parser.add_argument("--max-consecutive-skips", type=int, default=100, help="unusable records in a row that stop")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is there already")
    parser.add_argument("--verbose", action="store_true", help="log each skipped record")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


class _OnDevice:
    """A VQGAN that takes and gives tensors of the CPU."""

    def __init__(self, vqgan: Any, device: str) -> None:
        self._vqgan, self._device = vqgan, device
        self.num_codes, self.num_indices = vqgan.num_codes, vqgan.num_indices
        self.preprocess = vqgan.preprocess

    def encode(self, images: Any) -> Any:
        return self._vqgan.encode(images.to(self._device)).cpu()


def _load_vqgan(model: ModelConfig, device: str) -> _OnDevice | None:
    if model.vq.path is None:
        return None
    from megatron_hgpt.vision.vqgan import VQGAN

    return _OnDevice(VQGAN.load(Path(model.vq.path), device), device)


def main(argv: Sequence[str]) -> int:
    """Entry point: returns the exit status; a user's mistake is one line, not a traceback."""
    arguments = build_parser().parse_intermixed_args(list(argv))
    level = logging.DEBUG if arguments.verbose else logging.INFO
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_hgpt").setLevel(level)
    try:
        config = load_resolved(arguments.config, arguments.overrides, arguments.preset)
        model = config.model
        folder = model.tokenizer or model.backbone
        if folder is None:
            raise ConfigError("neither model.tokenizer nor model.backbone names a folder; set one of them")
        options = PreprocessOptions(
            template=template_of(model),
            system_prompt=model.system_prompt,
            num_indices=model.vq.indices,
            # Without any word about the tower, CLIP ViT-L/14-336's.
            num_image_tokens=model.vision.num_image_tokens if model.vision.hf_config else 576,
            max_seq_length=model.max_seq_length,
            max_image_side=config.data.max_image_side,
            max_consecutive_skips=arguments.max_consecutive_skips,
            num_workers=arguments.workers,
            window=arguments.window,
            overwrite=arguments.overwrite,
            progress_bar=True,
        )
        manifest = preprocess(
            [Input(path=path, image_root=arguments.image_root, source=arguments.source) for path in arguments.input],
            arguments.output,
            tokenizer=TextTokenizer.load(folder),
            vocabulary=Vocabulary.from_config(model),
            options=options,
            vqgan=_load_vqgan(model, arguments.device),
            vqgan_folder=None if model.vq.path is None else Path(model.vq.path),
        )
    except HealthGPTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    counts = manifest["counts"]
    skipped = manifest["skipped"] or "none"
    print(f"{arguments.output}: {counts['samples']} samples {counts['per_task']}, {counts['images']} pictures,")
    print(f"  {counts['tokens']} tokens, {counts['supervised_tokens']} supervised; skipped: {skipped}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
