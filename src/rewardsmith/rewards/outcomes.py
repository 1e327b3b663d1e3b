"""What a reward function said of one completion, the weighted total, and the guard that stops a failing reward.

Design section 5 names the outcomes. Data and arithmetic only: `pool` makes the scores, `train` uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Outcome = Literal[
    "ok",
    "not_a_number",
    "exception",
    "timeout",
    "crash",
    "out_of_memory",
    "output_limit",
    "abstain",
    "infrastructure",
]

GUARDED_CALLS = 200
GUARDED_SHARE = 0.2
STEP_SHARE = 0.5
LARGEST_TOTAL = 1e12  # as of a single value: advantages square differences of totals


@dataclass(frozen=True, slots=True)
class Score:
    """One call of one function. `value` is at most 1e12 in size, or None: the completion is left out of its group.

    `seconds` is wall time of the call, `prints` what it printed (cut), `error` why there is no number.
    """

    outcome: Outcome
    value: float | None
    seconds: float
    prints: str = ""
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether this counts towards the error rate; a function may abstain without failing."""
        return self.outcome not in ("ok", "abstain")


def total(scores: Mapping[str, Score], weights: Mapping[str, float]) -> float | None:
    """The weighted sum over the functions of one completion. A function of weight 0 is only measured.

    None when a function that counts has no value, or when the sum is larger than LARGEST_TOTAL in size.
    """
    values = [(weights[name], score.value) for name, score in scores.items() if weights[name]]
    if any(value is None for _, value in values):
        return None
    amount = sum(weight * value for weight, value in values if value is not None)
    return amount if abs(amount) <= LARGEST_TOTAL else None  # NaN is not


class ErrorGuard:
    """Watches the error rate of every function of one revision; start a new one after a change or a resume.

    A function trips it by failing in more than 20 % of its first 200 calls (as soon as that is certain), or in more
    than 50 % of its calls in two steps running.
    """

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}
        self._failed: dict[str, int] = {}
        self._bad_steps: dict[str, int] = {}

    def observe(self, scores: Iterable[Mapping[str, Score]]) -> str | None:
        """Take in one step, a mapping for each completion. The answer is the reason to pause, or None."""
        by_function: dict[str, list[Score]] = {}
        for completion in scores:
            for name, score in completion.items():
                by_function.setdefault(name, []).append(score)
        reasons = [reason for name, calls in by_function.items() if (reason := self._observe(name, calls))]
        return "; ".join(reasons) or None

    def _observe(self, name: str, calls: list[Score]) -> str | None:
        seen = self._calls.get(name, 0)
        first = calls[: max(0, GUARDED_CALLS - seen)]
        self._calls[name] = seen + len(first)
        self._failed[name] = self._failed.get(name, 0) + sum(score.failed for score in first)
        failed = [score for score in calls if score.failed]
        bad = len(failed) > STEP_SHARE * len(calls)
        self._bad_steps[name] = self._bad_steps.get(name, 0) + 1 if bad else 0
        if first and self._failed[name] > GUARDED_SHARE * GUARDED_CALLS:
            rate = f"failed in {self._failed[name]} of its first {self._calls[name]} calls"
        elif self._bad_steps[name] >= 2:
            rate = f"failed in more than half of its calls in {self._bad_steps[name]} steps running"
        else:
            return None
        last = failed[-1] if failed else None
        return f"reward function {name!r} {rate}" + (f", last by {last.outcome}: {gist(last)[:200]}" if last else "")


def gist(score: Score) -> str:
    """The line of an error that names it: the last one of a traceback, the first one of anything else."""
    lines = (score.error or "no text").strip().splitlines()
    return lines[-1] if score.outcome in ("exception", "out_of_memory") else lines[0]
