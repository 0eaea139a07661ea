"""Each CPU replacement, shown against what megatron.core does without it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from megatron_hgpt import cpu_platform
from megatron_hgpt.errors import ConfigError

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU platform is inactive on a GPU machine")


def run(code: str, *arguments: str, install: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, where nothing is patched yet."""
    head = "from megatron_hgpt import cpu_platform; cpu_platform.install_if_needed()\n" if install else ""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", head + textwrap.dedent(code), *arguments], capture_output=True, text=True
    )


REPLACED = {
    "the current device is the CPU": "import torch; assert torch.zeros(1, device=torch.cuda.current_device()).is_cpu",
    "tensors stay where they are": "import torch; t = torch.ones(2); assert t.cuda() is t",
    "synchronize and streams do nothing": """
        import torch
        torch.cuda.synchronize(); torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
        with torch.cuda.stream(torch.cuda.Stream()): torch.cuda.empty_cache()
        """,
    "gradients are clipped without CUDA types": """
        import torch
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
        p = torch.nn.Parameter(torch.ones(4)); p.grad = torch.full((4,), 2.0)
        clip_grad_by_total_norm_fp32([p], max_norm=1.0, total_norm=4.0)
        assert torch.allclose(p.grad, torch.full((4,), 0.5))
        """,
    "the gradient norm is taken on the CPU": """
        import torch
        from megatron.core.utils import local_multi_tensor_l2_norm
        assert float(local_multi_tensor_l2_norm(0, None, [[torch.full((4,), 2.0)]], False)[0]) == 4.0
        """,
    "the fp32 optimizer's scale lives on the CPU": """
        import torch
        from megatron.core.optimizer.optimizer import FP32Optimizer
        from megatron.core.optimizer import OptimizerConfig
        p = torch.nn.Parameter(torch.ones(2))
        assert FP32Optimizer(torch.optim.SGD([p], lr=1.0), OptimizerConfig(lr=1.0), None).get_loss_scale().is_cpu
        """,
    "the bf16 optimizer accepts CPU parameters": """
        import torch
        from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
        from megatron.core.optimizer import OptimizerConfig
        p = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        config = OptimizerConfig(lr=1.0, bf16=True)
        o = Float16OptimizerWithFloat16Params(torch.optim.SGD([p], lr=1.0), config, None, None)
        assert o.fp32_from_float16_groups[0][0].dtype == torch.float32
        """,
    "a context-parallel rank finds its rotary angles": """
        import torch
        from megatron.core.models.common.embeddings import rotary_pos_embedding
        group = type("Group", (), {"size": lambda self: 2, "rank": lambda self: 1})()
        angles = torch.arange(8).view(8, 1)
        assert rotary_pos_embedding.get_pos_emb_on_this_cp_rank(angles, 0, group).flatten().tolist() == [2, 3, 4, 5]
        """,
    "causal masks are built on the CPU": """
        from megatron.core.transformer.utils import get_default_causal_mask
        assert get_default_causal_mask(3).tolist() == [[False, True, True], [False, False, True], [False] * 3]
        """,
}


EACH = """
import json, sys
failures = {}
for name, code in json.loads(sys.argv[1]).items():
    try:
        exec(compile(code, name, "exec"), {})
    except Exception as error:
        failures[name] = repr(error)
print(json.dumps(failures))
"""


def failures(*, install: bool) -> dict[str, str]:
    snippets = json.dumps({name: textwrap.dedent(code) for name, code in REPLACED.items()})
    result = run(EACH, snippets, install=install)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@cpu_only
def test_every_replacement_works() -> None:
    assert failures(install=True) == {}


@cpu_only
def test_every_replacement_is_needed() -> None:
    # A name missing here means that megatron.core does it by itself by now: drop the replacement.
    assert set(failures(install=False)) == set(REPLACED)


@cpu_only
def test_tracker_gives_the_same_draws_again_and_leaves_the_default_generator_alone() -> None:
    result = run(
        """
        import torch
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        draws = []
        for outside in (0, 3):
            torch.manual_seed(0)
            tracker = CudaRNGStatesTracker(); tracker.add("model-parallel-rng", 5)
            torch.rand(outside); before = torch.get_rng_state()
            with tracker.fork(): draws.append(torch.rand(4))
            assert torch.equal(before, torch.get_rng_state())
            with tracker.fork(): assert not torch.equal(torch.rand(4), draws[-1])
        assert torch.equal(*draws)
        """
    )
    assert result.returncode == 0, result.stderr


@cpu_only
def test_the_platform_is_no_news() -> None:
    """Every command would say it; the head of a training run names the layers."""
    code = "from megatron_hgpt import cpu_platform; cpu_platform.install_if_needed()"
    quiet, loud = (run(f"import logging; logging.basicConfig(level='{level}')\n{code}", install=False) for level in
                   ("INFO", "DEBUG"))  # fmt: skip
    assert "no CUDA device" not in quiet.stderr and "no CUDA device" in loud.stderr


def test_a_gpu_machine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "Stream")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu_platform.install_if_needed() is False
    assert {name: getattr(torch.cuda, name) for name in before} == before


def package(folder: Path, name: str, init: str, *submodules: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(init)
    for submodule in submodules:
        (folder / name / f"{submodule}.py").write_text("")


def forget(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    monkeypatch.syspath_prepend(str(folder))
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)


def test_a_foreign_apex_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package(tmp_path, "apex", "")
    forget(monkeypatch, tmp_path, "apex")
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("placeholder"))
    monkeypatch.delitem(sys.modules, "apex")
    cpu_platform.hide_foreign_apex()
    assert "pip uninstall apex" in caplog.text
    with pytest.raises(ImportError):
        __import__("apex")


def test_nvidias_apex_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "apex", "", "normalization", "optimizers")
    forget(monkeypatch, tmp_path, "apex")
    cpu_platform.hide_foreign_apex()
    assert "apex" not in sys.modules


def test_a_half_installed_transformer_engine_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "transformer_engine", "raise RuntimeError('Could not find shared object file')")
    forget(monkeypatch, tmp_path, "transformer_engine")
    with pytest.raises(ConfigError, match=r"installed only in part.*pip uninstall transformer-engine"):
        cpu_platform.check_transformer_engine()
