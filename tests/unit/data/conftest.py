"""Dataset folders of synthetic samples."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_hgpt.data.dataset import describe_vocabulary
from megatron_hgpt.data.mmap_format import DatasetWriter
from megatron_hgpt.samples import IMAGE_TOKEN_ID, Task
from megatron_hgpt.text.templates import resolve_system_prompt
from megatron_hgpt.text.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """A 12 x 8 picture in one grey per number."""

    def make(grey: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (12, 8), (grey, grey, grey)).save(buffer, format="PNG")
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def make_dataset(png: Callable[[int], bytes], vocabulary: Vocabulary) -> Callable[..., Path]:
    """Write `tasks` as samples: id "c0", "g1" …, tokens 1, image, 10 + i, 20 + i (the last two supervised)."""

    def make(folder: Path, tasks: Sequence[Task], *, bad: Sequence[int] = (), **changes: Any) -> Path:
        description: dict[str, Any] = {
            "tokenizer": {"sha256": "abc", "vocab_size": 400},
            "template": {"name": "phi3_instruct", "system_prompt": resolve_system_prompt("phi3_instruct", None)},
            "vocabulary": describe_vocabulary(vocabulary),
            "vq": {"sha256": None, "num_codes": 16, "num_indices": 4},
        }
        with DatasetWriter(folder) as writer:
            for i, task in enumerate(tasks):
                writer.add(
                    sample_id=f"{task.value[0]}{i}",
                    task=task,
                    tokens=[1, IMAGE_TOKEN_ID, 10 + i, 20 + i],
                    loss_mask=[False, False, True, True],
                    images=[b"no picture" if i in bad else png(i)],
                )
            writer.finish({**description, **changes})
        return folder

    return make
