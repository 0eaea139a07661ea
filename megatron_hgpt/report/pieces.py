"""Pieces of HTML that the sections of the page share."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names its rows; texts are escaped."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<div class="table"><table><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>'


def number(value: float | None, spec: str) -> str:
    """`value` in the format `spec`; a dash for None."""
    return "–" if value is None else format(value, spec)
