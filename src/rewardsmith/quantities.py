"""Durations and sizes in the one or two units that a person would say. Text only: nothing here reads a clock."""

from __future__ import annotations

MIB, GIB = 2**20, 2**30


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `2 h 30 min`, `3 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return "{} d {} h".format(*divmod(hours, 24))


def figure(value: float) -> str:
    """A number of seconds with the digits that mean something: `0.034`, `2.1`, `130`."""
    if value >= 1:
        return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
    return f"{value:.2g}" if value >= 0.001 else "0"


def size(count: float) -> str:
    """Bytes as `340 MiB`, `0.6 GiB`, `12 GiB`."""
    if count < GIB / 2:
        return f"{count / MIB:.0f} MiB"
    return f"{count / GIB:.1f} GiB" if count < 10 * GIB else f"{count / GIB:.0f} GiB"
