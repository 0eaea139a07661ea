"""Ranges of numbers, as part of an option's type: ``Annotated[int, Within(1, 4096)]``.

Every number of a configuration has both ends: above the upper one a value is a slip of the pen, or takes the machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def _text(limit: float) -> str:
    """A limit as a user would write it: whole numbers in full."""
    return str(int(limit)) if float(limit).is_integer() and abs(limit) < 1e15 else f"{limit:g}"


@dataclass(frozen=True)
class Above:
    """A finite number greater than `minimum`."""

    minimum: float

    def __str__(self) -> str:
        return f"above {_text(self.minimum)}"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return self.minimum < value < math.inf  # not math.isfinite: it fails for whole numbers beyond every float


@dataclass(frozen=True)
class AtMost:
    """`maximum` or less: beside a lower bound, what is certainly a slip of the pen above it."""

    maximum: float

    def __str__(self) -> str:
        return f"at most {_text(self.maximum)}"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return value <= self.maximum


@dataclass(frozen=True)
class Within:
    """From `low` to `high`, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{_text(self.low)} to {_text(self.high)}"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Below:
    """From `low`, included, to `high`, excluded."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"at least {_text(self.low)} and below {_text(self.high)}"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return self.low <= value < self.high


Bound = Above | AtMost | Within | Below
