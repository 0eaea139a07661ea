"""Line charts as inline SVG: coloured by the page's style sheet, so they follow its light or dark scheme and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from megatron_hgpt.rounding import ceil_div

Point = tuple[float, float]

_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 34
_MAX_POINTS = 300


@dataclass(kw_only=True, slots=True)
class Series:
    """One line; `css_class` names its colour in the style sheet."""

    label: str
    points: list[Point]
    """(step, value); values that are not finite must be left out."""
    css_class: str
    smooth: bool = False
    """Draw a running mean over faint raw values."""
    markers: bool = False
    """Draw a ring around each point: they are few, or even one, which a line would not show."""


def line_chart(series: Sequence[Series], *, title: str, y_label: str, allow_log: bool = True) -> str:
    """An SVG figure of `series` over optimizer steps; empty string if there is nothing to draw.

    The y axis becomes logarithmic where the positive values span more than a factor of 30 and `allow_log` is set.
    """
    drawn = [s for s in series if s.points]
    values = [y for s in drawn for _, y in s.points]
    if not values:
        return ""
    steps = [x for s in drawn for x, _ in s.points]
    log = allow_log and min(values) > 0 and max(values) / min(values) > 30
    low, high = (min(values), max(values)) if log or min(values) < 0 else (0.0, max(values))
    ticks = _log_ticks(low, high) if log else linear_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    if high == low:
        high = low + 1.0
    x_low, x_high = 0.0, max(max(steps), 1.0)

    def x_of(step: float) -> float:
        return _LEFT + (step - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def path(points: Sequence[Point], css_class: str) -> str:
        coordinates = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        return f'<polyline class="{css_class}" points="{coordinates}"/>'

    parts = [
        f'<line class="gridline" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_of(t):.1f}" y2="{y_of(t):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 7}" y="{y_of(t) + 3.5:.1f}" text-anchor="end">{_number(t)}</text>'
        for t in ticks
    ]
    for tick in (t for t in linear_ticks(x_low, x_high) if t <= x_high and t == int(t)):
        parts.append(
            f'<text class="tick" x="{x_of(tick):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">'
            f"{int(tick):,}</text>"
        )
    parts.append(f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">step</text>')
    for line in drawn:
        points = _thin(line.points)
        if line.smooth and len(points) > 10:
            parts.append(path(points, f"raw {line.css_class}"))
            points = _smooth(points)
        parts.append(path(points, line.css_class))
        if line.markers:
            parts += [
                f'<circle class="{line.css_class}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.2"/>' for x, y in points
            ]
    ends = "; ".join(f"{s.label} from {s.points[0][1]:.4g} to {s.points[-1][1]:.4g}" for s in drawn)
    alt = f"{title}, {y_label} over {int(x_high):,} steps: {ends}"
    scale = f"{y_label} (log scale)" if log else y_label
    keys = " ".join(f'<span class="key {s.css_class}">{escape(s.label)}</span>' for s in drawn)
    return (
        f'<figure class="chart"><figcaption><strong>{escape(title)}</strong> <span>{escape(scale)}</span>'
        f'<span class="keys">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(alt)}">{"".join(parts)}</svg></figure>'
    )


def _thin(points: list[Point]) -> list[Point]:
    """At most `_MAX_POINTS` points: means of neighbouring ones."""
    size = ceil_div(len(points), _MAX_POINTS)
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def _smooth(points: list[Point]) -> list[Point]:
    """Centred running mean over a tenth of the points, narrower at both ends so that those stay where they are."""
    half = max(1, len(points) // 20)
    smoothed = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        window = points[i - reach : i + reach + 1]
        smoothed.append((x, sum(y for _, y in window) / len(window)))
    return smoothed


def linear_ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if span / (m * magnitude) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around the range; with 1, 2, 5 in between where it is narrow."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
    below = [t for t in ticks if t <= low * (1 + 1e-9)]
    above = [t for t in ticks if t >= high * (1 - 1e-9)]
    return [t for t in ticks if below[-1] <= t <= above[0]]


def _number(value: float) -> str:
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.6g}"
    return np.format_float_scientific(float(f"{value:.4g}"), trim="-", exp_digits=1)
