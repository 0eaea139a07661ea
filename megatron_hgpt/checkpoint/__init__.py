"""Checkpoints in megatron.core's distributed format: what training changes, not the frozen base.

A checkpoint folder ``step_00000100/`` holds

    *.distcp, .metadata, common.pt, metadata.json    tensors and per-rank random states (torch_dist)
    healthgpt.json                                   what it belongs to: model fingerprint, frozen base, stage, step, …
    resolved_config.yaml                             the configuration of the run that wrote it

Saved: both adapters, every H-LoRA plugin, embedding and head; AdamW moments and fp32 main weights of what trains, keyed
by parameter name. The tower and the backbone's layers are frozen in every stage and come from their own folders, which
healthgpt.json names by a digest of their content (`frozen_base`).
A folder is written as ``step_….tmp`` and renamed once complete, so a name without ``.tmp`` is always whole.

Must not import: data, hooks, trainer.
"""

from megatron_hgpt.checkpoint.checkpointer import Checkpointer, Restored, SavedCheckpoint, load_weights
from megatron_hgpt.checkpoint.description import checkpoint_folders, fingerprint, read_info, resolve_folder

__all__ = [
    "Checkpointer",
    "Restored",
    "SavedCheckpoint",
    "checkpoint_folders",
    "fingerprint",
    "load_weights",
    "read_info",
    "resolve_folder",
]
