"""Integer division that rounds up, and whole numbers in words."""

from __future__ import annotations


def ceil_div(count: int, size: int) -> int:
    """Pieces of at most `size` that `count` takes."""
    return -(-count // size)


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple that is at least `count`."""
    return ceil_div(count, multiple) * multiple


def plural(count: int, noun: str) -> str:
    """``1 step``, ``1,200 steps``, ``2 processes``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"
