"""How numbers and texts are written in findings and on the page."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: float | None) -> str:
    """A score."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """`4 %`; what is neither none nor all does not look like it."""
    if share is None:
        return "-"
    if 0 < share < 0.01:
        return "< 1 %"
    if 0.99 < share < 1:
        return "> 99 %"
    return f"{100 * share:.0f} %"


def seconds(value: float) -> str:
    """`40 µs`, `1.2 ms`, `35 ms`, `1.2 s`, `130 s`."""
    if value >= 99.95:
        return f"{value:.0f} s"
    if value >= 0.9995:
        return f"{value:.1f} s"
    if value >= 0.000995:
        return f"{1000 * value:.1f} ms" if value < 0.00995 else f"{1000 * value:.0f} ms"
    return f"{1e6 * value:.0f} µs"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`; there has to be one."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def plain(text: str, most: int) -> str:
    """In one line of at most so many characters, without what could steer a terminal."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
    shown = " ".join(shown.split())
    return shown if len(shown) <= most else f"{shown[: most - 1].rstrip()}…"


def quoted(text: str, most: int) -> str:
    return f'"{plain(text, most)}"'
