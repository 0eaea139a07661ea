"""Exceptions a user of the package can meet; every message names the field or file, the value and the remedy."""

from __future__ import annotations


class HealthGPTError(Exception):
    """Base class of all errors raised on purpose by this package."""


class ConfigError(HealthGPTError, ValueError):
    """A configuration value is unknown, malformed or does not fit another one."""


class CheckpointError(HealthGPTError, RuntimeError):
    """A checkpoint or weight file does not fit the model, or cannot be read."""


class DataError(HealthGPTError, RuntimeError):
    """A dataset as a whole cannot be used (missing file, manifest of another tokenizer, too many bad samples)."""


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
