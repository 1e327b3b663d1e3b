"""A change of reward functions, tried on completions that were scored before: what it would mean for them.

Arithmetic only. Where the completions and their old scores come from, how the new scores are made and who may ask is
the business of the server.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Any, Literal

from rewardsmith import wire
from rewardsmith.rewards.outcomes import GUARDED_SHARE, Score, gist
from rewardsmith.rewards.workbench.measures import known, percentile, same, silent

BINS = 20
MOST_CHANGES = 50
MOST_FAILURES = 50
PROMPT_CHARACTERS, COMPLETION_CHARACTERS = 500, 2000
SLOW_SECONDS = 1.0

Baseline = Literal["group", "batch"]


@dataclass(frozen=True)
class Stored:
    """A completion as the job stored it, and the row it was drawn for. `scores` and `total` are the stored ones."""

    step: int
    idx: int
    row: int
    sample: int
    revision: int
    prompt: str
    completion: str
    example: dict[str, Any]
    scores: dict[str, Score]
    total: float | None


@dataclass(frozen=True)
class Judged:
    """A completion under both sets."""

    stored: Stored
    old: Mapping[str, Score]
    new: Mapping[str, Score]
    old_total: float | None
    new_total: float | None
    old_push: int = 0
    new_push: int = 0

    @property
    def flipped(self) -> bool:
        return self.old_push * self.new_push < 0


@dataclass(frozen=True)
class Change:
    """The two sets and their difference. `ran` names the new functions that were called, the others' scores are old."""

    diff: wire.RevisionDiff
    old: Sequence[wire.RevisionFunction]
    new: Sequence[wire.RevisionFunction]
    ran: frozenset[str]


def with_pushes(groups: Iterable[Sequence[Judged]], baseline: Baseline) -> list[list[Judged]]:
    """In which direction training would push each completion: 1 towards it, -1 away from it, 0 neither.

    Against the mean of its group, or of all completions of its step.
    """
    rows = [list(group) for group in groups]
    old, new = _expected(rows, "old_total", baseline), _expected(rows, "new_total", baseline)
    return [
        [
            replace(
                one,
                old_push=_direction(one.old_total, old[place]),
                new_push=_direction(one.new_total, new[place]),
            )
            for one in group
        ]
        for place, group in enumerate(rows)
    ]


def _expected(groups: Sequence[Sequence[Judged]], total: str, baseline: Baseline) -> list[float | None]:
    """What is expected of a completion, by group; None where the group teaches nothing."""
    totals = [[getattr(one, total) for one in group] for group in groups]
    if baseline == "group":
        return [None if silent(values) else fmean(known(values)) for values in totals]
    of_step: dict[int, list[float]] = {}
    for group, values in zip(groups, totals, strict=True):
        of_step.setdefault(group[0].stored.step, []).extend(known(values))
    return [fmean(of_step[group[0].stored.step]) if of_step[group[0].stored.step] else None for group in groups]


def _direction(total: float | None, expected: float | None) -> int:
    if total is None or expected is None or same(total, expected):
        return 0
    return 1 if total > expected else -1


def forecast(groups: Sequence[Sequence[Judged]]) -> wire.SignalForecast:
    """By `with_pushes`: a group in which nothing is pushed gives no signal."""
    every = [one for group in groups for one in group]
    return wire.SignalForecast(
        groups=len(groups),
        without_signal_old=sum(not any(one.old_push for one in group) for group in groups),
        without_signal_new=sum(not any(one.new_push for one in group) for group in groups),
        completions=len(every),
        flipped=sum(one.flipped for one in every),
    )


def comparisons(judged: Sequence[Judged], change: Change) -> list[wire.ScoreComparison]:
    """Function by function, in the order of the diff."""
    found = []
    for function in change.diff.functions:
        old = [one.old[function.name] for one in judged if function.name in one.old]
        new = [one.new[function.name] for one in judged if function.name in one.new]
        both = [one for one in judged if function.name in one.old and function.name in one.new]
        found.append(
            wire.ScoreComparison(
                name=function.name,
                change=function.change,
                ran=function.name in change.ran,
                old=_summary([score.value for score in old], old) if old else None,
                new=_summary([score.value for score in new], new) if new else None,
                histogram=_histogram([score.value for score in old], [score.value for score in new]),
                differing=sum(_differ(one.old[function.name].value, one.new[function.name].value) for one in both),
            )
        )
    return found


def total_comparison(judged: Sequence[Judged]) -> wire.ScoreComparison:
    old, new = [one.old_total for one in judged], [one.new_total for one in judged]
    differing = sum(_differ(one.old_total, one.new_total) for one in judged)
    return wire.ScoreComparison(
        name="total",
        change="changed" if differing else "same",
        old=_summary(old),
        new=_summary(new),
        histogram=_histogram(old, new),
        differing=differing,
    )


def _differ(old: float | None, new: float | None) -> bool:
    return (old is None) != (new is None) or (old is not None and new is not None and not same(old, new))


def _summary(values: Sequence[float | None], scores: Sequence[Score] = ()) -> wire.ScoreSummary:
    numbers, seconds = known(values), [score.seconds for score in scores]
    return wire.ScoreSummary(
        count=len(numbers),
        missing=len(values) - len(numbers),
        failed=sum(score.failed for score in scores),
        mean=fmean(numbers) if numbers else None,
        std=pstdev(numbers) if numbers else None,
        lowest=min(numbers, default=None),
        highest=max(numbers, default=None),
        seconds_p50=percentile(seconds, 0.5) if seconds else None,
        seconds_p95=percentile(seconds, 0.95) if seconds else None,
        seconds_p99=percentile(seconds, 0.99) if seconds else None,
        seconds_max=max(seconds, default=None),
    )


def _histogram(old: Sequence[float | None], new: Sequence[float | None]) -> wire.Histogram | None:
    """Both over the same intervals, from the lowest value of all to the highest."""
    numbers = known([*old, *new])
    if not numbers:
        return None
    low, high = min(numbers), max(numbers)
    bins = 1 if same(low, high) else BINS
    width = (high - low) / bins

    def counted(values: Sequence[float | None]) -> list[int]:
        counts = [0] * bins
        for value in known(values):
            counts[min(int((value - low) / width), bins - 1) if width else 0] += 1
        return counts

    return wire.Histogram(
        edges=[low + width * place for place in range(bins)] + [high], old=counted(old), new=counted(new)
    )


def row_changes(judged: Iterable[Judged]) -> list[wire.RowChange]:
    """The completions whose total differs most, those that have it under one set only before all others."""

    def distance(one: Judged) -> float:
        if one.old_total is None or one.new_total is None:
            return float("inf")
        return abs(one.new_total - one.old_total)

    differing = [one for one in judged if _differ(one.old_total, one.new_total)]
    return [
        wire.RowChange(
            step=one.stored.step,
            idx=one.stored.idx,
            row=one.stored.row,
            sample=one.stored.sample,
            prompt=_cut(one.stored.prompt, PROMPT_CHARACTERS),
            completion=_cut(one.stored.completion, COMPLETION_CHARACTERS),
            old={name: score.value for name, score in one.old.items()},
            new={name: score.value for name, score in one.new.items()},
            old_total=one.old_total,
            new_total=one.new_total,
            flipped=one.flipped,
        )
        for one in sorted(differing, key=distance, reverse=True)[:MOST_CHANGES]
    ]


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]}… [{len(text) - characters} characters more]"


def failures(judged: Iterable[Judged], ran: frozenset[str]) -> list[wire.CallFailure]:
    """What the functions that were called failed with, the most frequent first; alike but for numbers is the same."""
    found: dict[tuple[str, str, str], list[tuple[Judged, Score]]] = {}
    for one in judged:
        for name, score in one.new.items():
            if name in ran and score.failed:
                found.setdefault((name, score.outcome, re.sub(r"\d+", "#", gist(score))), []).append((one, score))
    most = sorted(found.items(), key=lambda item: len(item[1]), reverse=True)[:MOST_FAILURES]
    return [
        wire.CallFailure(
            function=name,
            outcome=outcome,
            count=len(calls),
            error=calls[0][1].error or "",
            step=calls[0][0].stored.step,
            row=calls[0][0].stored.row,
            sample=calls[0][0].stored.sample,
        )
        for (name, outcome, _), calls in most
    ]


def findings(change: Change, functions: Sequence[wire.ScoreComparison], signal: wire.SignalForecast) -> Iterator[str]:
    """What to look at before the change is made, in plain words."""
    on_error = {function.name: function.on_error for function in change.new}
    for compared in functions:
        new = compared.new
        if new is None or not compared.ran:
            continue
        calls = new.count + new.missing
        if new.failed:
            follows = "; with on_error='fail' the first one would end the job" * (on_error[compared.name] == "fail")
            if not follows and new.failed > GUARDED_SHARE * calls:
                follows = "; a job pauses when it fails that often"
            yield f"{compared.name} failed in {new.failed} of {calls} calls{follows}"
        if new.count > 1 and new.lowest is not None and new.highest is not None and same(new.lowest, new.highest):
            yield f"{compared.name} gives {new.lowest:g} to every completion: there is nothing to learn from it"
        if new.seconds_p95 is not None and new.seconds_p95 > SLOW_SECONDS:
            yield f"{compared.name} takes {new.seconds_p95:.1f} s or more in one of 20 calls"
    lost = signal.without_signal_new - signal.without_signal_old
    if lost > 0:
        yield (
            f"{signal.without_signal_new} of {signal.groups} groups would give no signal, {lost} more than now: their "
            "completions would all score the same"
        )
    if signal.flipped:
        yield f"{signal.flipped} of {signal.completions} completions would be pushed the other way"
    if not any(compared.differing for compared in functions) and not signal.flipped:
        changes = [compared.change for compared in functions]
        if "added" not in changes and "removed" not in changes:
            yield "no score differs from the stored one"
