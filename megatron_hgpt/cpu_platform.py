"""Lets megatron.core 0.16 run on CPU tensors and gloo; does nothing on a machine with a CUDA device.

megatron.core assumes CUDA in five ways. Each is answered by the smallest change that works:

1. It asks ``torch.cuda`` for the current device, random state and streams: those few functions are replaced.
2. It writes ``device="cuda"`` and ``"torch.cuda.FloatTensor"`` as constants inside functions: the constants of
   the functions listed in `_MODULES_WITH_CUDA_CONSTANTS` are rewritten to their CPU spelling.
3. It moves tensors with ``.cuda()``: that returns the tensor itself.
4. Its fused helpers are compiled at import through ``torch.compile``: the decorator is switched off, as the
   CPU compile would take longer than a small run.
5. It takes the rotary angles of a context-parallel rank through pinned memory: that function is replaced.

The sequence-parallel norm, which megatron.core's local spec refuses, is not patched but supplied by our layer spec
(`megatron_hgpt.hlora.layer_spec`), and the Adam convention by `megatron_hgpt.optim`.

It also keeps a package that is called ``apex`` but is not NVIDIA's out of Megatron's sight, and reports a Transformer
Engine that is installed only in part, on every machine.

The import-order rule: `install_if_needed` comes before the first import of megatron.core, whose modules look for CUDA,
Apex and Transformer Engine while they are imported. So whatever starts work calls it (or `distributed.initialize`,
which does) and imports megatron.core, and every module built on it, inside functions and after that call.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from megatron_hgpt.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

logger = logging.getLogger(__name__)

_MODULES_WITH_CUDA_CONSTANTS = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)

_CPU_SPELLING = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

_MARK = "_megatron_hgpt_cpu_platform"


def is_cpu() -> bool:
    """True when no CUDA device is usable, so that megatron.core has to run on the CPU."""
    return not torch.cuda.is_available()


def install_if_needed() -> bool:
    """Prepare the process for megatron.core, by the import-order rule of this module; further calls cost nothing.

    Returns:
        True when the CPU replacements are active (no CUDA device), False on a GPU machine.

    Raises:
        ConfigError: Transformer Engine is installed only in part.
    """
    hide_foreign_apex()
    check_transformer_engine()
    if not is_cpu():
        return False
    if getattr(torch.cuda, _MARK, False):
        return True
    setattr(torch.cuda, _MARK, True)
    _replace_torch_cuda_functions()
    with warnings.catch_warnings():
        # Megatron warns at import about Apex and Transformer Engine, which a CPU machine cannot have.
        warnings.simplefilter("ignore")
        _disable_jit_fuser()
        _replace_rng_functions()
        rotary = importlib.import_module("megatron.core.models.common.embeddings.rotary_pos_embedding")
        rotary.get_pos_emb_on_this_cp_rank = _rotary_of_context_rank  # type: ignore[attr-defined]
        for name in _MODULES_WITH_CUDA_CONSTANTS:
            _rewrite_cuda_constants(importlib.import_module(name))
    logger.debug("no CUDA device: megatron.core runs on the CPU with gloo (fp32/bf16 without fused kernels: slower)")
    return True


def hide_foreign_apex() -> None:
    """Hide an importable ``apex`` that is not NVIDIA's (PyPI's `apex` is an unrelated Pyramid toolkit)."""
    if "apex" in sys.modules:
        return
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return
    locations = list(spec.submodule_search_locations or [])
    finder = importlib.machinery.PathFinder
    if locations and all(finder.find_spec(f"apex.{part}", locations) for part in ("normalization", "optimizers")):
        return
    sys.modules["apex"] = None  # type: ignore[assignment]
    logger.warning(
        "the installed package 'apex' (%s) is not NVIDIA's and is ignored; remove it with `pip uninstall apex`",
        spec.origin,
    )


def check_transformer_engine() -> None:
    """Refuse a Transformer Engine whose Python files are there but whose compiled library is not.

    Raises:
        ConfigError: importing it fails with anything but ImportError, which megatron.core would not survive.
    """
    if "transformer_engine" in sys.modules or importlib.util.find_spec("transformer_engine") is None:
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return
    except Exception as error:
        raise ConfigError(
            f"transformer-engine is installed only in part: {error}. Install its compiled parts "
            "(`pip install --no-build-isolation 'transformer-engine[pytorch]'` on a CUDA machine) "
            "or remove it (`pip uninstall transformer-engine`)."
        ) from error


class _NoStream:
    """Stands for a CUDA stream or event on the CPU, where everything is synchronous."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def _nothing(self, *_args: object, **_kwargs: object) -> None:
        return None

    synchronize = wait_stream = wait_event = record_event = wait = record = _nothing


@contextlib.contextmanager
def _no_stream_context(_stream: object) -> Iterator[None]:
    yield


def _cpu_manual_seed(seed: int) -> None:
    torch.random.default_generator.manual_seed(int(seed))


def _cpu_rng_state(*_args: object, **_kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *_args: object, **_kwargs: object) -> None:
    torch.set_rng_state(state)


def _replace_torch_cuda_functions() -> None:
    replacements: dict[str, Callable[..., object]] = {
        "current_device": lambda: torch.device("cpu"),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "current_stream": lambda *_: _NoStream(),
        "default_stream": lambda *_: _NoStream(),
        "stream": _no_stream_context,
        "manual_seed": _cpu_manual_seed,
        "get_rng_state": _cpu_rng_state,
        "set_rng_state": _set_cpu_rng_state,
        "Stream": _NoStream,
        "Event": _NoStream,
    }
    for name, function in replacements.items():
        setattr(torch.cuda, name, function)
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign,assignment]


def _disable_jit_fuser() -> None:
    jit = importlib.import_module("megatron.core.jit")
    jit.disable_jit_fuser()


def _replace_rng_functions() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = _cpu_rng_state  # type: ignore[attr-defined]
    random._set_cuda_rng_state = _set_cpu_rng_state  # type: ignore[attr-defined]
    random.CudaRNGStatesTracker.fork = _fork


@contextlib.contextmanager
def _fork(tracker: CudaRNGStatesTracker, name: str = "model-parallel-rng") -> Iterator[None]:
    """`CudaRNGStatesTracker.fork` on the CPU generator, without the warning that this generator moved."""
    if name not in tracker.states_:
        raise KeyError(f"random state {name!r} was never added to the tracker; has {sorted(tracker.states_)}")
    outer = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer)


def _rotary_of_context_rank(
    angles: torch.Tensor, seq_dim: int, cp_group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Chunks c and 2C-1-c of the 2C chunks of a sequence, without pinned memory."""
    size, rank = cp_group.size(), cp_group.rank()
    chunks = angles.chunk(2 * size, dim=seq_dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=seq_dim)


def _rewrite_cuda_constants(module: types.ModuleType) -> None:
    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            for member in vars(value).values():
                _rewrite_function(member, module.__name__)
        else:
            _rewrite_function(value, module.__name__)


def _rewrite_function(value: Any, module_name: str) -> None:
    """Rewrite the constants of one function (through decorators) that was defined in `module_name`."""
    while value is not None:
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, types.FunctionType) and value.__module__ == module_name:
            value.__code__ = _cpu_code(value.__code__)
        value = getattr(value, "__wrapped__", None)


def _cpu_code(code: types.CodeType) -> types.CodeType:
    return code.replace(co_consts=tuple(_cpu_constant(constant) for constant in code.co_consts))


def _cpu_constant(constant: object) -> object:
    if isinstance(constant, str):
        return _CPU_SPELLING.get(constant, constant)
    if isinstance(constant, tuple | frozenset):
        return type(constant)(_cpu_constant(item) for item in constant)
    if isinstance(constant, types.CodeType):
        return _cpu_code(constant)
    return constant
