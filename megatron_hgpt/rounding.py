"""Integer division that rounds up."""

from __future__ import annotations


def ceil_div(count: int, size: int) -> int:
    """Pieces of at most `size` that `count` takes."""
    return -(-count // size)


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple that is at least `count`."""
    return ceil_div(count, multiple) * multiple
