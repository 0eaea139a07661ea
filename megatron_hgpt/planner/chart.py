"""A plan as one SVG file: stacked memory of the fullest rank per layout, the device's size, and the step's time."""

from __future__ import annotations

from html import escape

from megatron_hgpt.planner.hardware import GIB
from megatron_hgpt.planner.plan import LayoutPlan, Plan
from megatron_hgpt.report.charts import linear_ticks

_PARTS = {
    "frozen": "#3d4a5c",
    "trained": "#0b6e75",
    "gradients": "#5cc4cb",
    "optimizer": "#146c43",
    "activations": "#b4500f",
    "working": "#f2a065",
    "reserve": "#b8c0ca",
}
_BAR, _GAP, _LEFT, _RIGHT, _TOP, _PLOT = 18, 8, 190, 190, 84, 480


def memory_chart(plan: Plan, *, top: int) -> str:
    """An SVG document of the first `top` layouts of a plan."""
    shown = plan.layouts[:top]
    capacity = plan.request.cluster.gpu.memory_gib
    ticks = linear_ticks(0.0, max([capacity, *(layout.peak.total / GIB for layout in shown)]))
    scale = _PLOT / ticks[-1]
    height = _TOP + len(shown) * (_BAR + _GAP) + 34
    width = _LEFT + _PLOT + _RIGHT
    bottom = height - 28
    title = (
        f"{plan.request.config.name} on {plan.request.cluster.num_gpus} x {plan.request.cluster.gpu_name}: "
        "memory of the fullest rank, GiB"
    )
    parts = [_text(16, 24, title, size=15, weight=600), *_legend()]
    for tick in ticks:
        x = _LEFT + tick * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{bottom}" stroke="#dfe4ea"/>')
        parts.append(_text(x, bottom + 16, f"{tick:g}", anchor="middle"))
    for i, layout in enumerate(shown):
        parts += _bar(layout, y=_TOP + i * (_BAR + _GAP), scale=scale)
    x = _LEFT + capacity * scale
    parts.append(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{bottom}" stroke="#a8201a" stroke-dasharray="5 3"/>'
    )
    parts.append(_text(x, _TOP - 12, f"{capacity:g} GiB", anchor="middle"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}" font-family="system-ui,sans-serif">'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="#16202c">{escape(text)}</text>'
    )


def _legend() -> list[str]:
    parts = []
    for i, (name, colour) in enumerate(_PARTS.items()):
        x = 16 + i * 108
        parts.append(f'<rect x="{x}" y="39" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 17, 49.5, name))
    return parts


def _bar(plan: LayoutPlan, *, y: float, scale: float) -> list[str]:
    middle, x = y + _BAR - 5, float(_LEFT)
    parts = [_text(_LEFT - 8, middle, plan.layout.name, anchor="end", weight=600 if plan.fits else 400)]
    for name, colour in _PARTS.items():
        width = getattr(plan.peak, name) / GIB * scale
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>')
        x += width
    note = f"{plan.time.total:.2f} s, MFU {plan.mfu:.0%}" if plan.fits else "does not fit"
    parts.append(_text(max(x, _LEFT + _PLOT) + 8, middle, note))
    return parts
