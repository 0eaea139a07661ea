"""Which frozen weights a checkpoint belongs to, told from their files without reading them whole.

The digest covers every tensor's name, type and shape, and the first, middle and last KiB of its data: it is the same
however the tensors are spread over files, and reads under 10 MB of a 32B backbone. Two models that were trained apart
differ in it; it is no defence against weights forged on purpose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hgpt.config import RunConfig
from megatron_hgpt.convert.safetensors_files import read_header
from megatron_hgpt.errors import CheckpointError, HealthGPTError
from megatron_hgpt.vision.clip import tower_hash

_SAMPLE_BYTES = 1024


def weights_digest(folder: Path) -> str:
    """``sha256:<hex>`` of the safetensors files in a folder.

    Raises:
        CheckpointError: no such file, or a damaged one.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file")
    records = sorted(record for file in files for record in _records(file))
    return "sha256:" + hashlib.sha256("\n".join(records).encode()).hexdigest()


def _records(path: Path) -> Iterator[str]:
    """One line per tensor: name, type, shape, digest of its samples."""
    header, start = read_header(path)
    with path.open("rb") as stream:
        for name, entry in header.items():
            try:
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end:  # a negative size would read the whole file
                    raise ValueError(f"data_offsets {begin} to {end}")
                size = min(_SAMPLE_BYTES, end - begin)
                samples = hashlib.sha256()
                for offset in (begin, (begin + end - size) // 2, end - size):
                    stream.seek(start + offset)
                    samples.update(stream.read(size))
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(f"{path} is not a readable safetensors file: {name}: {error!r}") from error
            yield json.dumps([name, entry["dtype"], entry["shape"], samples.hexdigest()])


def _identity(config: RunConfig) -> dict[str, str]:
    model = config.model
    if model.backbone is None:
        backbone = f"random weights, training.seed={config.training.seed}"
    else:
        backbone = weights_digest(Path(model.backbone))
    vision = model.vision
    drawn = vision.tower is None
    tower = f"random weights, {tower_hash(vision)}" if drawn else weights_digest(Path(str(vision.tower)))
    return {"backbone": backbone, "vision_tower": tower}


def base_identity(config: RunConfig) -> dict[str, str]:
    """Backbone and vision tower by digest, or as random with what decides the draw; every rank must call it.

    The first rank reads and tells the others.

    Raises:
        CheckpointError: weights that cannot be read, on every rank.
    """
    outcome: list[Any] = [None]
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        try:
            outcome = [_identity(config)]
        except HealthGPTError as error:
            outcome = [error]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], HealthGPTError):
        raise outcome[0]
    identity: dict[str, str] = outcome[0]
    return identity
