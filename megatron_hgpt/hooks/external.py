"""What the hooks of experiment trackers share: the library or one line that says how to get it, and the run's name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_hgpt.errors import ConfigError
from megatron_hgpt.files import write_atomic
from megatron_hgpt.hooks.base import TrainState
from megatron_hgpt.hooks.tolerance import Tolerance


def import_tracker(module: str, *, field: str, package: str, defaults: Mapping[str, str]) -> ModuleType:
    """The library `module`.

    Args:
        module: its import name.
        field: of the configuration, which asks for it.
        package: its name for pip.
        defaults: environment variables that the library reads while it is imported, set where the user has not.

    Raises:
        ConfigError: it is not installed.
    """
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{field} is set but {module} cannot be imported ({error}): pip install {package}") from error


def stored_run_id(state: TrainState, tracker: str) -> str | None:
    """The id of the run that this one resumes; None where the stage starts anew."""
    path = run_id_file(state, tracker)
    return path.read_text(encoding="utf-8").strip() if state.step > 0 and path.is_file() else None


def store_run_id(state: TrainState, tracker: str, run_id: str) -> None:
    """Keep the id for a later resume."""
    with Tolerance().writing(run_id_file(state, tracker)):
        write_atomic(run_id_file(state, tracker), run_id + "\n")


def run_id_file(state: TrainState, tracker: str) -> Path:
    """Where the run's id is kept."""
    return state.output_dir / f"{tracker}_run_id"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``section.field`` -> value of a nested mapping."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
