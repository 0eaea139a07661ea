"""Checks once per task that every parameter that should train receives a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_hgpt.errors import HealthGPTError
from megatron_hgpt.parameters import ADAPTER_GROUPS, GROUP_TASK, group_of
from megatron_hgpt.samples import MicroBatch, Task


class GradientAudit:
    """Asserts, at the first step of each task, that every trainable parameter of that task received a gradient.

    LoRA that silently does not train is the field's most repeated failure: recomputation with frozen inputs, a wrong
    freeze order, an adapter outside the graph. It costs nothing after the tasks were seen once.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._waiting: dict[str, Task | None] = {}
        self._seen: set[str] = set()
        self._handles = []
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                self._waiting[name] = GROUP_TASK.get(group_of(name))
                self._handles.append(parameter.register_hook(lambda _grad, name=name: self._seen.add(name)))

    def check(self, batches: Sequence[MicroBatch]) -> None:
        """Check the parameters of the tasks that this rank's micro-batches had; adapters, where they had images.

        Raises:
            HealthGPTError: names parameters that train but got no gradient.
        """
        if not self._waiting:
            return
        tasks = {task for batch in batches for task in batch.tasks}
        with_images = {task for batch in batches if batch.num_images for task in (batch.image_tasks or batch.tasks)}
        due = [
            name
            for name, task in self._waiting.items()
            if task is None or task in (with_images if group_of(name) in ADAPTER_GROUPS else tasks)
        ]
        missing = [name for name in due if name not in self._seen]
        if missing:
            raise HealthGPTError(
                f"{len(missing)} trainable parameters received no gradient in their first step, e.g. {missing[:3]}: "
                "they would silently never train. Check recomputation, the stage's groups and the model's wiring."
            )
        for name in due:
            del self._waiting[name]
        if not self._waiting:
            for handle in self._handles:
                handle.remove()
