"""Names that megatron.core's annotations read at import; its fused MLP is not used."""


class Sequential:
    """An annotation."""


class FusibleOperation:
    """An annotation."""
