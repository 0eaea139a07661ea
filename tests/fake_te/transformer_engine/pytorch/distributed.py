"""Names that megatron.core reads at import."""


class CudaRNGStatesTracker:
    """Subclassed by megatron.core, not used."""


def activation_recompute_forward(*_args: object, **_kwargs: object) -> None:
    """Imported for Transformer Engine's own recomputation, which is not stood in for."""
    raise AssertionError("not part of the stand-in")
