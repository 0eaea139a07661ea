"""megatron_hgpt: train, evaluate and serve HealthGPT on NVIDIA Megatron-Core.

What a notebook needs is here: ``from megatron_hgpt import Prompt, load_config, load_run, preprocess, train``
(docs/api.md). Each is imported when it is first asked for: importing the package alone imports no other package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_hgpt.config import RunConfig as RunConfig
    from megatron_hgpt.data.preprocess_run import preprocess_run as preprocess
    from megatron_hgpt.errors import HealthGPTError as HealthGPTError
    from megatron_hgpt.inference.generator import Prompt as Prompt
    from megatron_hgpt.inference.generator import Sampling as Sampling
    from megatron_hgpt.inference.loading import LoadedRun as LoadedRun
    from megatron_hgpt.inference.loading import load_run as load_run
    from megatron_hgpt.model_folders import load_resolved as load_config
    from megatron_hgpt.run_stage import main as train
    from megatron_hgpt.samples import Task as Task

__version__ = "0.1.0"

_SOURCES = {
    "HealthGPTError": "errors:HealthGPTError",
    "LoadedRun": "inference.loading:LoadedRun",
    "Prompt": "inference.generator:Prompt",
    "RunConfig": "config:RunConfig",
    "Sampling": "inference.generator:Sampling",
    "Task": "samples:Task",
    "load_config": "model_folders:load_resolved",
    "load_run": "inference.loading:load_run",
    "preprocess": "data.preprocess_run:preprocess_run",
    "train": "run_stage:main",
}
"""Name -> module of this package and the name there."""

__all__ = ["HealthGPTError", "LoadedRun", "Prompt", "RunConfig", "Sampling", "Task", "load_config", "load_run",
           "preprocess", "train"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _SOURCES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
