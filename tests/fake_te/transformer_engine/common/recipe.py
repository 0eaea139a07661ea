"""Names that megatron.core subclasses or reads at import."""

import enum


class Format(enum.Enum):
    """FP8 formats."""

    E4M3 = 1
    HYBRID = 2


class DelayedScaling:
    """Subclassed by megatron.core."""


class Float8CurrentScaling:
    """What `fp8_recipe: tensorwise` becomes."""

    def __init__(self, *, fp8_format: Format) -> None:
        self.fp8_format = fp8_format


class Recipe:
    """An annotation."""
