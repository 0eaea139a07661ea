"""Checkpoints in the format of torch.distributed.checkpoint: what training changes, not the frozen base.

A checkpoint folder ``step_00000100/`` holds

    *.distcp, .metadata     tensors and per-rank random states: one file per rank, and what lies where
    healthgpt.json          what it belongs to: model fingerprint, frozen base, stage, step, …; checksums of every file
    resolved_config.yaml    the configuration of the run that wrote it

Saved: both adapters, every H-LoRA plugin, embedding and head; AdamW moments and fp32 main weights of what trains, keyed
by parameter name. The tower and the backbone's layers are frozen in every stage and come from their own folders, which
healthgpt.json names by a digest of their content (`frozen_base`).
A folder is written as ``step_….<n>.tmp`` and renamed once complete, so a name without ``.tmp`` is always whole.
What lies in a folder is never run, whoever wrote it: see `metadata_file` and `reading`.

Must not import: data, hooks, trainer.
"""

from megatron_hgpt.checkpoint.checkpointer import Checkpointer, SavedCheckpoint
from megatron_hgpt.checkpoint.choice import OpenCheckpoint, open_checkpoint
from megatron_hgpt.checkpoint.description import checkpoint_folders, fingerprint, read_info
from megatron_hgpt.checkpoint.integrity import verify_checkpoint
from megatron_hgpt.checkpoint.restoring import Restored, load_opened, load_weights

__all__ = [
    "Checkpointer",
    "OpenCheckpoint",
    "Restored",
    "SavedCheckpoint",
    "checkpoint_folders",
    "fingerprint",
    "load_opened",
    "load_weights",
    "open_checkpoint",
    "read_info",
    "verify_checkpoint",
]
