"""The package as a library: lazy names, and the notebook of docs/api.md as it stands there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import megatron_hgpt
from megatron_hgpt.demo.tokenizers import make_tiny_tokenizer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def test_the_notebook_of_the_documentation_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "images").mkdir()
    Image.radial_gradient("L").save(tmp_path / "images" / "scan.png")
    turns = '[{"from": "human", "value": "<image>\\nCT?"}, {"from": "gpt", "value": "no"}]'
    records = ", ".join(f'{{"id": "{name}", "image": "scan.png", "conversations": {turns}}}' for name in "abcd")
    (tmp_path / "train.json").write_text(f"[{records}]")
    values = {
        "preset": "tiny",
        "output_dir": "run",
        "model": {"tokenizer": str(make_tiny_tokenizer(tmp_path / "tokenizer"))},
        "data": {"train": ["data/train"]},
        "training": {"stage": "stage1_comprehension", "global_batch_size": 2, "precision": "fp32"},
    }
    (tmp_path / "my_run.yaml").write_text(yaml.safe_dump(values))
    done = python(block, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 samples\n")
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, megatron_hgpt; dir(megatron_hgpt); before = [m for m in ('torch', 'yaml') if m in sys.modules]; "
        "from megatron_hgpt import RunConfig, load_config; print(before, 'torch' in sys.modules, RunConfig().name)"
    )
    assert python(code, tmp_path).stdout == "[] False run\n"


def test_every_name_is_there_and_typed() -> None:
    assert {name for name in megatron_hgpt.__all__ if getattr(megatron_hgpt, name) is not None} <= set(
        dir(megatron_hgpt)
    )
    tree = ast.parse((ROOT / "megatron_hgpt" / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.asname for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(megatron_hgpt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        megatron_hgpt.trian  # type: ignore[attr-defined]
