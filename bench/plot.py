"""Small multiples as an SVG: one panel per quantity, logarithmic axes, a line per series. Numbers in, text out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, COLUMNS = 250, 190, 4
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 30, 34  # room around a panel's axes
COLOURS = ("#1f2937", "#2563eb", "#d97706")
STYLE = "text{font:11px sans-serif;fill:#374151}.t{font-weight:bold}.g{stroke:#e5e7eb}.a{stroke:#9ca3af}"


@dataclass(frozen=True)
class Panel:
    """`series` by name: one value for each of `xs`. `title` says what x is; values are above 0."""

    title: str
    xs: Sequence[float]
    series: Mapping[str, Sequence[float]]


def small_multiples(panels: Sequence[Panel], unit: str) -> str:
    """All panels have the same y axis, from the least to the largest value, so that they can be compared."""
    values = [value for panel in panels for line in panel.series.values() for value in line]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    lines = -(-len(panels) // COLUMNS)
    width, height = WIDTH * min(COLUMNS, len(panels)), HEIGHT * lines + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
    ]
    for i, panel in enumerate(panels):
        parts.append(f'<g transform="translate({i % COLUMNS * WIDTH},{i // COLUMNS * HEIGHT})">')
        parts += [*_panel(panel, low, max(high, low + 1)), "</g>"]
    for i, name in enumerate(panels[0].series):
        x = LEFT + i * 110
        parts.append(f'<path d="M{x} {height - 12}h18" stroke="{COLOURS[i]}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 23}" y="{height - 8}">{escape(f"{name}, {unit}")}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, low: int, high: int) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    first, last = math.log(panel.xs[0]), math.log(panel.xs[-1])

    def x_of(value: float) -> float:
        return LEFT + (right - LEFT) * (math.log(value) - first) / ((last - first) or 1)

    def y_of(value: float) -> float:
        return bottom - (bottom - TOP) * (math.log10(value) - low) / (high - low)

    parts = [f'<text class="t" x="{LEFT}" y="18">{escape(panel.title)}</text>']
    for power in range(low, high + 1):
        y = y_of(10.0**power)
        parts.append(f'<path class="g" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    parts.append(f'<path class="a" d="M{LEFT} {TOP}V{bottom}H{right}" fill="none"/>')
    for x in panel.xs:
        parts.append(f'<text x="{x_of(x):.1f}" y="{bottom + 15}" text-anchor="middle">{x:g}</text>')
    for colour, line in zip(COLOURS, panel.series.values(), strict=False):
        points = [(x_of(x), y_of(y)) for x, y in zip(panel.xs, line, strict=True)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
    return parts
