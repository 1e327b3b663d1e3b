"""A small curve for the terminal: one column per step or per few steps, drawn with eighth blocks. Text in, text out."""

from collections.abc import Sequence
from itertools import pairwise

EIGHTHS = " ▁▂▃▄▅▆▇█"


def curve(title: str, values: Sequence[float], *, top: float = 1.0, width: int = 60, height: int = 5) -> str:
    """`values` of steps 1.. as an area of `height` lines between 0 and `top`, at most `width` columns wide.

    With more values than columns each column is the mean of its share.
    """
    columns = _resampled(values, min(width, len(values)))
    levels = [round(min(max(value / top, 0.0), 1.0) * height * 8) for value in columns]
    lines = [f"  {title}"]
    for line in reversed(range(height)):
        label = f"{top * (line + 1) / height:4.1f}" if line in (height - 1, (height - 1) // 2) else "    "
        lines.append(f"  {label} ┤" + "".join(EIGHTHS[min(max(level - line * 8, 0), 8)] for level in levels))
    lines.append("   0.0 ┼" + "─" * len(levels))
    lines.append("        step 1" + f"{len(values)}".rjust(max(len(levels) - 6, 1)))
    return "\n".join(lines)


def _resampled(values: Sequence[float], columns: int) -> list[float]:
    bounds = [len(values) * i // columns for i in range(columns + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
