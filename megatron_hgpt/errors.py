"""Exceptions a user of the package can meet; every message names the field or file, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class HealthGPTError(Exception):
    """Base class of all errors raised on purpose by this package."""


class ConfigError(HealthGPTError, ValueError):
    """A configuration value is unknown, malformed or does not fit another one."""


class CheckpointError(HealthGPTError, RuntimeError):
    """A checkpoint or weight file does not fit the model, or cannot be read."""


class DataError(HealthGPTError, RuntimeError):
    """A dataset as a whole cannot be used (missing file, manifest of another tokenizer, too many bad samples)."""


class DivergedError(HealthGPTError, RuntimeError):
    """Training cannot go on with these numbers, and would end the same way again (exit status `DIVERGED`)."""


class HungError(HealthGPTError, RuntimeError):
    """Something did not come within its time limit; starting again may well help (exit status `HUNG`)."""


class SkipSample(HealthGPTError):  # noqa: N818  (a signal to the caller, not a failure of the run)
    """One sample cannot be used; the caller skips it and counts `reason`.

    Args:
        reason: short stable identifier that is counted, e.g. ``"missing_image"``.
        detail: what was wrong, with file name and value.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def reason_of(error: Exception) -> str:
    """What went wrong, without the number and the path that the system's own text has: messages name the path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean <prefix><nearest>?"`` for the end of a message; empty where nothing known is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one ConfigError for all problems, each on a line of its own; do nothing where there are none."""
    different = list(dict.fromkeys(problems))
    if len(different) == 1:
        raise ConfigError(different[0])
    if different:
        lines = [f"  {number}. {problem}" for number, problem in enumerate(different, start=1)]
        raise ConfigError("\n".join([f"{len(different)} problems", *lines]))
