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
        detail: what was wrong, in words of this package.
        quote: what the record says there, or the file's name: may be private, so that lists leave it out.
    """

    def __init__(self, reason: str, detail: str, quote: str = "") -> None:
        super().__init__(f"{reason}: {detail}{f' ({quote})' if quote else ''}")
        self.reason = reason
        self.detail = detail
        self.quote = quote


MOST_PROBLEMS = 50
"""Of a configuration, that are said at once."""


def reason_of(error: Exception) -> str:
    """What went wrong, without the number and the path that the system's own text has: messages name the path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean <prefix><nearest>?"`` for the end of a message; empty where nothing known is near."""
    near = difflib.get_close_matches(name[:100], list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def shown(value: object) -> str:
    """A value as Python writes it, shortened to what a line of a terminal can bear."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; a list in a list in a list …
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:100]} … {text[-20:]} ({len(text)} characters)"


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one ConfigError for all problems, each on a line of its own; do nothing where there are none."""
    different = list(dict.fromkeys(problems))
    if len(different) == 1:
        raise ConfigError(different[0])
    if different:
        lines = [f"  {number}. {problem}" for number, problem in enumerate(different[:MOST_PROBLEMS], start=1)]
        left = len(different) - len(lines)
        lines += [f"  … and {left} more"] if left else []
        raise ConfigError("\n".join([f"{len(different)} problems", *lines]))
