"""Ranges of numbers, as part of an option's type: ``Annotated[int, AtLeast(1)]``."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AtLeast:
    """A finite number, `minimum` or more."""

    minimum: float

    def __str__(self) -> str:
        return f"at least {self.minimum:g}"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return math.isfinite(value) and value >= self.minimum


@dataclass(frozen=True)
class Above:
    """A finite number greater than `minimum`."""

    minimum: float

    def __str__(self) -> str:
        return f"above {self.minimum:g}"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return math.isfinite(value) and value > self.minimum


@dataclass(frozen=True)
class Within:
    """From `low` to `high`, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Below:
    """From `low`, included, to `high`, excluded."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"at least {self.low:g} and below {self.high:g}"

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return self.low <= value < self.high


Bound = AtLeast | Above | Within | Below
