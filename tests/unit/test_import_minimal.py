"""Importing the package needs torch, megatron-core and a few small libraries; everything else is imported when used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONAL = (
    "transformers", "tokenizers", "sentencepiece", "gguf", "safetensors", "skimage", "scipy", "pydicom", "nibabel",
    "tensorboard", "matplotlib", "torchmetrics", "pyarrow", "triton", "transformer_engine", "apex", "deepspeed",
    "gradio", "wandb",
)  # fmt: skip

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
from megatron_hgpt import cpu_platform
cpu_platform.install_if_needed()  # megatron.core itself looks for some of them, so it comes first
import megatron.core.tensor_parallel, megatron.core.optimizer, megatron.core.pipeline_parallel
import megatron.core.models.gpt, megatron.core.dist_checkpointing, megatron.core.datasets.indexed_dataset
for name in OPTIONAL:
    for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        del sys.modules[module]
    sys.modules[name] = None
import megatron_hgpt
# Imported only where Triton or Transformer Engine is, or to import as much as possible at once.
ELSEWHERE = ("megatron_hgpt.hlora.gate_triton", "megatron_hgpt.hlora.te_linear", "megatron_hgpt.testing.preloaded")
for module in pkgutil.walk_packages(megatron_hgpt.__path__, "megatron_hgpt."):
    if module.name not in ELSEWHERE:
        importlib.import_module(module.name)
        print(module.name)
"""


def test_every_module_imports_without_the_optional_packages() -> None:
    code = IMPORT_EVERYTHING.replace("OPTIONAL", repr(OPTIONAL))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.split()) > 40  # every module was met


def test_the_block_bites() -> None:
    """The same block stops a module that does import one of them."""
    code = "import sys; sys.modules['triton'] = None; import megatron_hgpt.hlora.gate_triton"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "ModuleNotFoundError" in result.stderr
