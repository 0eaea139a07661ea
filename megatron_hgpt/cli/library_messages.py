"""Known messages of libraries that tell a user nothing to act on, each silenced where it arises, with the reason.

Only these: a warning that is not listed here is shown.
"""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    # megatron.core at import. Apex's fused norm is optional; torch's is what the parity tests are about, and PyPI's
    # `apex` is an unrelated package that a user who follows the hint would install.
    (r"Apex is not installed\. Falling back to Torch Norm", UserWarning),
)
"""Start of the message (a regular expression), category."""

_LOGGERS: tuple[tuple[str, int], ...] = (
    # megatron.core announces at every start, as warnings, that its machinery for rerunning steps is off.
    ("megatron.core.rerun_state_machine", logging.ERROR),
)
"""Logger, and the least severe record of it that is shown."""


def silence_known() -> None:
    """Silence them in this process; called by the command line before a library is imported."""
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, level in _LOGGERS:
        logging.getLogger(name).setLevel(level)
