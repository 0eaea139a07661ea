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

    def __init__(self, *, fp8_format: Format, fp8_dpa: bool = False, fp8_mha: bool = False) -> None:
        assert not fp8_dpa and not fp8_mha, "attention computes in bf16"
        self.fp8_format = fp8_format


class Recipe:
    """An annotation."""
