"""Checkpoints in megatron.core's distributed format: what training changes, not the frozen base.

A checkpoint folder ``step_00000100/`` holds

    *.distcp, .metadata, common.pt, metadata.json    tensors and per-rank random states (torch_dist)
    healthgpt.json                                   what it belongs to: model fingerprint, stage, step, trained groups

Saved: both adapters, every H-LoRA plugin, embedding and head; AdamW moments and fp32 main weights of what trains, keyed
by parameter name. The tower and the backbone's layers are frozen in every stage and come from their own folders.
A folder is written as ``step_….tmp`` and renamed once complete, so a name without ``.tmp`` is always whole.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hgpt.config import ModelConfig, RunConfig
from megatron_hgpt.engines.base import OptimizerState, TrainingEngine
from megatron_hgpt.errors import CheckpointError
from megatron_hgpt.stages import group_of

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_INFO = "healthgpt.json"
_SAVED_GROUPS = ("abstract_adapter", "concrete_adapter", "hlora_comprehension", "hlora_generation", "vocabulary")


@dataclass(kw_only=True, slots=True)
class Restored:
    """What a resumed run continues from."""

    path: Path
    step: int
    """Optimizer steps completed."""
    loader_state: dict[str, Any]


def fingerprint(model: ModelConfig) -> dict[str, Any]:
    """What two models must share for one's weights to fit the other: sizes, vocabulary, plugins, vision depths."""
    vision = model.vision
    return {
        "backbone": {key: value for key, value in sorted(model.hf_config.items()) if key in _SHAPE_KEYS},
        "vocabulary": {**dataclasses.asdict(model.vocabulary), "num_codes": model.vq.num_codes},
        "hlora": {
            name: None if plugin is None else {key: plugin[key] for key in ("lora_rank", "alpha", "num_experts")}
            for name, plugin in dataclasses.asdict(model.hlora).items()
        },
        "vision": {
            "hidden_size": vision.hf_config.get("hidden_size"),
            "comprehension_hidden_state": vision.comprehension_hidden_state,
            "generation_hidden_state": vision.generation_hidden_state,
        },
    }


_SHAPE_KEYS = frozenset(
    {
        "architectures",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    }
)


def checkpoint_folders(directory: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if re.fullmatch(r"step_\d{8}", path.name))


def read_info(folder: Path) -> dict[str, Any]:
    """The description beside the tensors.

    Raises:
        CheckpointError: the folder is no checkpoint of this package, or of a newer format.
    """
    path = folder / _INFO
    if not path.is_file():
        hint = "; it is an unfinished write" if folder.name.endswith(".tmp") else ""
        raise CheckpointError(f"{folder} is not a checkpoint of this package ({_INFO} is missing{hint})")
    info = json.loads(path.read_text())
    if info.get("format_version") != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {info.get('format_version')} cannot be read by this version ({_FORMAT_VERSION})"
        )
    return info


def _differences(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(set(mine) | set(theirs)):
        ours, other = mine.get(key), theirs.get(key)
        if isinstance(ours, dict) and isinstance(other, dict):
            yield from _differences(ours, other, f"{prefix}{key}.")
        elif ours != other:
            yield f"{prefix}{key}: the model has {ours}, the checkpoint {other}"


def _check_fits(config: RunConfig, folder: Path, info: dict[str, Any]) -> None:
    # JSON turns tuples into lists: compare what a round trip leaves.
    mine = json.loads(json.dumps(fingerprint(config.model)))
    problems = list(_differences(mine, info["fingerprint"]))
    if problems:
        raise CheckpointError(
            f"{folder} belongs to another model: {'; '.join(problems)}. "
            "Use the configuration it was trained with (resolved_config.yaml beside the run) or another checkpoint."
        )


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _prefix(models: Sequence[Any], i: int) -> str:
    return f"chunk {i}/" if len(models) > 1 else ""


def named_parameters(models: Sequence[Any]) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank by name; interleaved chunks, whose names repeat, are told apart by a prefix."""
    return {_prefix(models, i) + name: p for i, model in enumerate(models) for name, p in model.named_parameters()}


def _model_state(models: Sequence[Any], groups: Sequence[str]) -> dict[str, Any]:
    """Sharded tensors of the named groups by this rank's parameter names.

    Inside the checkpoint the layers of all pipeline stages are one tensor, so that any layout finds its part.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    metadata = _metadata()
    result = {}
    for i, model in enumerate(models):
        state = model.language_model.sharded_state_dict(prefix="language_model.", metadata=metadata)
        state.update(
            make_sharded_tensors_for_checkpoint(
                model.adapters.state_dict(prefix="", keep_vars=True),
                "adapters.",
                {},
                (),
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                dp_cp_group=metadata["dp_cp_group"],
            )
        )
        wanted = (name for name in state if group_of(name) in groups and "_extra_state" not in name)
        result.update({_prefix(models, i) + name: state[name] for name in wanted})
    return result


def _optimizer_tensors(state: OptimizerState, model_state: dict[str, Any]) -> dict[str, Any]:
    """Sharded tensors ``<slot>.<parameter name>`` of the optimizer's state."""
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    return {
        f"{slot}.{name}": make_sharded_optimizer_tensor(model_state[name], tensor, f"optimizer.{slot}")
        for name, slots in state.gather().items()
        for slot, tensor in slots.items()
    }


def _steps_per_group(state: OptimizerState) -> dict[str, int]:
    """Optimizer steps of each parameter group, over all pipeline stages; every rank must call it."""
    mine: dict[str, int] = {}
    for group in state.groups:
        mine[group["group"]] = max(mine.get(group["group"], 0), int(group.get("step", 0)))
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    # Megatron gives every rank every group; where a stage holds none of its parameters, it never steps.
    return {name: max(one.get(name, 0) for one in every) for name in {name for one in every for name in one}}


def _by_parameter(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """``<slot>.<parameter name>`` -> parameter name -> slot."""
    result: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        slot, name = key.split(".", 1)
        result.setdefault(name, {})[slot] = tensor
    return result


def _rng_object() -> Any:
    """This rank's random states, one object per (pipeline, tensor, data and context) rank."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    states = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    offset = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject("rng", states, shape, offset, replica_id=0)


class Checkpointer:
    """Saves and restores one run.

    Args:
        config: the run; `checkpoint.directory` (or ``<output_dir>/checkpoints``) is where checkpoints go.
        trained_groups: groups that this stage or an earlier one it started from has trained.
        is_writer: True on the one process that writes the description and renames.
    """

    def __init__(self, config: RunConfig, *, trained_groups: Sequence[str], is_writer: bool) -> None:
        self.config = config
        self.directory = Path(config.checkpoint.directory or Path(config.output_dir) / "checkpoints")
        self.trained_groups = sorted(set(trained_groups))
        self.is_writer = is_writer

    def save(self, models: Sequence[Any], engine: TrainingEngine, *, step: int, loader_state: dict[str, Any]) -> Path:
        """Write ``step_<step>``; every rank must call it."""
        from megatron.core import dist_checkpointing

        from megatron_hgpt.config_io import save_config

        final = self.directory / f"step_{step:08d}"
        temporary = final.with_name(final.name + ".tmp")
        if self.is_writer:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        torch.distributed.barrier()
        with engine.whole_parameters():
            model_state, state = _model_state(models, _SAVED_GROUPS), engine.optimizer_state()
            dist_checkpointing.save(
                {"model": model_state, "optimizer": _optimizer_tensors(state, model_state), "rng": _rng_object()},
                str(temporary),
                sharded_strategy=_save_strategy(),
            )
        steps = _steps_per_group(state)
        torch.distributed.barrier()
        if self.is_writer:
            info = {
                "format_version": _FORMAT_VERSION,
                "stage": self.config.training.stage,
                "step": step,
                "trained_groups": self.trained_groups,
                "optimizer_steps": steps,
                "loader": loader_state,
                "rng_layout": list(_rng_object().global_shape),
                "fingerprint": fingerprint(self.config.model),
            }
            save_config(self.config, temporary / "resolved_config.yaml")
            (temporary / _INFO).write_text(json.dumps(info, indent=1))
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            self._prune()
        torch.distributed.barrier()
        return final

    def _prune(self) -> None:
        keep = self.config.checkpoint.keep_last
        for old in checkpoint_folders(self.directory)[:-keep] if keep > 0 else []:
            shutil.rmtree(old)

    def restore_latest(self, models: Sequence[Any], engine: TrainingEngine) -> Restored | None:
        """Load the newest complete checkpoint of this run in place; None when there is none.

        Raises:
            CheckpointError: it belongs to another model or stage.
        """
        folders = checkpoint_folders(self.directory)
        if not folders:
            return None
        folder = folders[-1]
        info = read_info(folder)
        _check_fits(self.config, folder, info)
        if info["stage"] != self.config.training.stage:
            raise CheckpointError(
                f"{folder} is of {info['stage']}, this run trains {self.config.training.stage}: give each stage its "
                "output_dir and name the earlier stage's checkpoint in checkpoint.init_from"
            )
        rng = _rng_object()
        same_layout = list(rng.global_shape) == info["rng_layout"]
        if not same_layout:
            logger.warning("%s was saved at layout %s: dropout draws anew", folder, info["rng_layout"])
        with engine.whole_parameters(writable=True):
            model_state, state = _model_state(models, _SAVED_GROUPS), engine.optimizer_state()
            request: dict[str, Any] = {"model": model_state, "optimizer": _optimizer_tensors(state, model_state)}
            loaded = _load({**request, "rng": rng} if same_layout else request, folder)
            _copy_tensors(models, loaded["model"])
            state.scatter(_by_parameter(loaded["optimizer"]))
        for group in state.groups:
            group["step"] = info["optimizer_steps"][group["group"]]
        if same_layout:
            _restore_rng(loaded["rng"])
        return Restored(path=folder, step=info["step"], loader_state=info["loader"])


def _save_strategy() -> Any:
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    # One writer per rank: adapter checkpoints are small, and each writer is a process to start.
    return TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)


def _load(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load what `request` describes, after comparing its set of tensors with the folder's.

    Raises:
        CheckpointError: tensors are missing.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    present = dist_checkpointing.load_tensors_metadata(str(folder))
    wanted = {value.key for value in nested_values(request) if isinstance(value, ShardedTensor)}
    missing = sorted(wanted - set(present))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of the model, e.g. {missing[:3]}")
    with torch.no_grad():
        return dist_checkpointing.load(request, str(folder))


@torch.no_grad()
def _copy_tensors(models: Sequence[Any], loaded: dict[str, torch.Tensor]) -> None:
    parameters = named_parameters(models)
    for name, value in loaded.items():
        if value is not parameters[name] and value.data_ptr() != parameters[name].data_ptr():
            parameters[name].copy_(value)


def _restore_rng(states: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
    torch.cuda.set_rng_state(states["cuda"])
    torch.set_rng_state(states["cpu"])


def load_weights(models: Sequence[Any], config: RunConfig, folders: Sequence[str]) -> list[str]:
    """Load the weights that earlier stages trained, in order, into a model that is not yet wrapped.

    Of each folder only the groups it (or a stage before it) trained are taken, so that stage-1 comprehension and
    stage-1 generation, trained apart, add up.

    Args:
        models: the bare model parts of this pipeline stage.
        config: the run.
        folders: checkpoint folders, or run folders whose newest checkpoint is meant.

    Returns:
        The groups trained so far.

    Raises:
        CheckpointError: a folder that is no checkpoint, or of another model.
    """
    trained: set[str] = set()
    for name in folders:
        folder = resolve_folder(Path(name))
        info = read_info(folder)
        _check_fits(config, folder, info)
        groups = {"vocabulary" if group == "new_rows" else group for group in info["trained_groups"]}
        _copy_tensors(models, _load({"model": _model_state(models, sorted(groups))}, folder)["model"])
        trained |= set(info["trained_groups"])
        logger.info("loaded %s (%s, step %d): %s", folder, info["stage"], info["step"], ", ".join(sorted(groups)))
    return sorted(trained)


def resolve_folder(path: Path) -> Path:
    """A checkpoint folder itself, or the newest one of a run folder or its ``checkpoints``.

    Raises:
        CheckpointError: there is none.
    """
    if (path / _INFO).is_file() or path.name.startswith("step_"):
        return path
    for directory in (path, path / "checkpoints"):
        folders = checkpoint_folders(directory)
        if folders:
            return folders[-1]
    raise CheckpointError(f"{path} holds no complete checkpoint (step_* folder); train the earlier stage first")
