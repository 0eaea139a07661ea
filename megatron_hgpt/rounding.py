"""Integer division that rounds up, whole numbers in words, and sizes of files."""

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


def file_size(num_bytes: int) -> str:
    """``0.4 MB``, ``123 MB``, ``2.1 GB``; of 1000 each, as disks are sold."""
    megabytes = num_bytes / 1e6
    if megabytes >= 1000:
        return f"{megabytes / 1000:.1f} GB"
    return f"{megabytes:.1f} MB" if megabytes < 10 else f"{megabytes:.0f} MB"
