"""Parameters by name: which group one belongs to, what it is called at every layout, and which task trains it.

Groups:

    abstract_adapter, concrete_adapter              the adapter of comprehension, of generation
    hlora_comprehension, hlora_generation           the plugins
    vocabulary                                      all rows of embedding and head
    new_rows                                        the rows of the VQ tokens: a part of vocabulary, trained by a mask
    backbone, tower                                 frozen in every stage
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_hgpt.samples import Task

if TYPE_CHECKING:
    import torch

    from megatron_hgpt.model.healthgpt import HealthGPT

ADAPTER_GROUPS = {"abstract_adapter": Task.COMPREHENSION, "concrete_adapter": Task.GENERATION}


HLORA_GROUPS = {"hlora_comprehension": Task.COMPREHENSION, "hlora_generation": Task.GENERATION}


GROUP_TASK: Mapping[str, Task] = {**ADAPTER_GROUPS, **HLORA_GROUPS}
"""Groups that only one task's batches train; the others are shared."""


def group_of(parameter_name: str) -> str:
    """The group a parameter of `HealthGPT` belongs to, by its name."""
    for task, adapter in ((Task.COMPREHENSION, "abstract_adapter"), (Task.GENERATION, "concrete_adapter")):
        if f"adapters.{task.value}." in parameter_name:
            return adapter
        if f".hlora.{task.value}." in parameter_name:
            return f"hlora_{task.value}"
    if "tower." in parameter_name:
        return "tower"
    if "word_embeddings.weight" in parameter_name or "output_layer.weight" in parameter_name:
        return "vocabulary"
    return "backbone"


def parameter_group(trained: str) -> str:
    """The group (`group_of`) of the parameters that a stage's group trains: new_rows live in vocabulary."""
    return "vocabulary" if trained == "new_rows" else trained


def parameter_groups(trained: Iterable[str]) -> frozenset[str]:
    """`parameter_group` of several."""
    return frozenset(map(parameter_group, trained))


def canonical_name(name: str, layer_offset: int) -> str:
    """The name as an unsharded model has it: layers are numbered through all pipeline stages."""
    return re.sub(
        r"(?<=decoder\.layers\.)\d+", lambda match: str(int(match.group()) + layer_offset), name.removeprefix("module.")
    )


SAVED_GROUPS = ("abstract_adapter", "concrete_adapter", "hlora_comprehension", "hlora_generation", "vocabulary")
"""What checkpoints hold: everything that some stage trains."""


def chunk_prefix(models: Sequence[HealthGPT], i: int) -> str:
    """What tells the parameters of interleaved chunk `i` from those of the others; empty for a single one."""
    return f"chunk {i}/" if len(models) > 1 else ""


def named_parameters(models: Sequence[HealthGPT]) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank by name; interleaved chunks, whose names repeat, are told apart by a prefix."""
    return {chunk_prefix(models, i) + name: p for i, model in enumerate(models) for name, p in model.named_parameters()}
