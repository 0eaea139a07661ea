"""The save that a stop needs, around a checkpointer that fails as it is told."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

from megatron_hgpt.hooks.base import Phase
from megatron_hgpt.trainer import Trainer


def trainer(published: list[list[str]], phases: list[Phase]) -> Any:
    """At step 4, where a save is due; a signal comes while that is written."""
    asked = iter([False, True])
    answers = iter(published)

    def announced(**_: bool) -> list[Any]:
        phases.append(Phase.END)  # stands for the wait itself
        return [types.SimpleNamespace(path=Path(name)) for name in next(answers)]

    made: Any = Trainer.__new__(Trainer)
    made.step, made.total_steps, made.hooks, made.context, made.saves = 4, 9, [], None, 0
    made.config = types.SimpleNamespace(checkpoint=types.SimpleNamespace(save_interval_steps=4))
    made.signals = types.SimpleNamespace(agree=lambda _: next(asked))
    made.checkpointer = types.SimpleNamespace(published=announced)
    made._is_validation_due = lambda: False
    made._enter = phases.append
    made._save = lambda: setattr(made, "saves", made.saves + 1)
    return made


def test_a_save_that_failed_before_the_stop_is_made_again() -> None:
    failed = trainer([[], [], ["step_00000004"]], [])
    assert failed._save_and_validate() and failed.saves == 2
    written = trainer([[], ["step_00000004"]], [])
    assert written._save_and_validate() and written.saves == 1


def test_the_wait_for_a_save_has_the_limit_of_saves() -> None:
    phases: list[Phase] = []
    trainer([["step_00000004"]], phases)._announce_checkpoints(is_final=True)
    assert phases == [Phase.SAVE, Phase.END, Phase.REPORT]
