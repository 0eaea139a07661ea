"""How a process of `hgpt train` says why it ended: the exit statuses that its launcher and the cluster act upon."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """The statuses of this project; 128 + the number of a signal follows the shell, and anything else is a crash."""

    FINISHED = 0
    USER_ERROR = 2
    """A mistake that one line explains: starting again gives the same line."""
    DIVERGED = 3
    """Training diverged, or `anomaly`'s limits are used up: starting again gives the same."""
    HUNG = 75
    """Ended by `timeouts.step_limit_s` (EX_TEMPFAIL of sysexits.h): starting again helps."""
