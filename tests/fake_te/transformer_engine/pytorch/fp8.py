"""The state of the FP8 autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class FP8GlobalStateManager:
    """Whether, and with which recipe, an autocast is on."""

    enabled = False
    recipe: Any = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Inside an enabled autocast."""
        return cls.enabled


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
    """Nests; restores the outer state."""
    state = FP8GlobalStateManager
    before = state.enabled, state.recipe
    state.enabled, state.recipe = enabled, fp8_recipe
    try:
        yield
    finally:
        state.enabled, state.recipe = before
