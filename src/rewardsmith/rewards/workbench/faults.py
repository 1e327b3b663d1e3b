"""Errors of reward functions folded: the same outcome, on the same line, of the same kind, is one `Fault` with a count
and its first example. Lines are those of the user's file where that is known, else they count from the `def`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from rewardsmith.rewards.outcomes import Score, gist

# How tracebacks and the stacks of hanging calls name the text of a reward function.
_USERS_LINE = re.compile(r'File "<reward[^"\n]*>", line (\d+)')


class Origin(NamedTuple):
    """Where the text of a function begins."""

    file: str
    line: int


class Call(NamedTuple):
    """`row` is the row's number in the dataset, `text` what was scored."""

    row: int
    text: str
    score: Score


@dataclass(frozen=True)
class Fault:
    """`error` is the line that names it, `detail` all of it; `row` and `completion` are the first it happened on."""

    outcome: str
    where: str
    error: str
    count: int
    row: int
    completion: str
    detail: str


def failed(score: Score) -> bool:
    """Whether the function failed; `infrastructure` is not its fault."""
    return score.failed and score.outcome != "infrastructure"


def fold(calls: Iterable[Call], origin: Origin | None) -> list[Fault]:
    """The most frequent first."""
    faults: dict[tuple[str, str, str], Fault] = {}
    for row, text, score in calls:
        if not failed(score):
            continue
        error, where = gist(score), _where(score, origin)
        key = (score.outcome, where, error.partition(":")[0])
        if key in faults:
            faults[key] = replace(faults[key], count=faults[key].count + 1)
        else:
            faults[key] = Fault(score.outcome, where, error, 1, row, text, (score.error or "").strip())
    return sorted(faults.values(), key=lambda fault: -fault.count)


def _where(score: Score, origin: Origin | None) -> str:
    """`line 7` or `rewards.py, line 31`; empty where the error names no line."""
    lines = _USERS_LINE.findall(score.error or "")
    if not lines:
        return ""
    # A traceback ends with the newest frame, the stack of a call that was killed begins with it.
    line = int(lines[-1] if score.outcome in ("exception", "out_of_memory") else lines[0])
    return f"{origin.file}, line {origin.line + line - 1}" if origin else f"line {line}"
