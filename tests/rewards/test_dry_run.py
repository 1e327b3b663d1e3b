"""The arithmetic of a dry run, against the mathematics that trains."""

import random
from typing import Any

import pytest
import torch

from rewardsmith import wire
from rewardsmith.rewards.dry_run import (
    BINS,
    MOST_CHANGES,
    Change,
    Judged,
    Stored,
    comparisons,
    failures,
    findings,
    forecast,
    row_changes,
    total_comparison,
    with_pushes,
)
from rewardsmith.rewards.outcomes import Score
from rewardsmith.train.grpo import advantages

NAN = float("nan")


def stored(step: int = 1, row: int = 0, sample: int = 0, **fields: Any) -> Stored:
    known = {"idx": 0, "revision": 1, "prompt": "p", "completion": "c", "example": {}, "scores": {}, "total": None}
    return Stored(step=step, row=row, sample=sample, **known | fields)


def judged(old_total: float | None, new_total: float | None, step: int = 1, **scores: Any) -> Judged:
    return Judged(stored(step), scores.get("old", {}), scores.get("new", {}), old_total, new_total)


def ok(value: float | None, **fields: Any) -> Score:
    return Score(fields.pop("outcome", "ok"), value, fields.pop("seconds", 0.1), **fields)


def function(name: str, **settings: Any) -> wire.RevisionFunction:
    return wire.RevisionFunction(name=name, source="", source_sha256="", **settings)


def change(*names: str, ran: tuple[str, ...] = (), **settings: Any) -> Change:
    functions = [function(name, **settings) for name in names]
    diff = wire.RevisionDiff(functions=[wire.FunctionDiff(name=name, change="changed") for name in names])
    return Change(diff, functions, functions, frozenset(ran or names))


@pytest.mark.parametrize(
    ("kind", "baseline"),
    [
        ("group_std", "group"),
        ("group_mean", "group"),
        ("rloo", "group"),
        ("batch_std", "group"),
        ("reinforce_pp_baseline", "group"),
        ("reinforce_pp", "batch"),
    ],
)
def test_pushes_are_the_signs_of_the_advantages(kind: Any, baseline: Any):
    """Of totals with ties, groups that agree, and completions that have none."""
    draw = random.Random(3)
    totals = [[draw.choice([0.0, 0.1 + 0.2, 0.3, 1.0, NAN]) for _ in range(4)] for _ in range(30)]
    totals += [[0.5] * 4, [NAN] * 4, [NAN, NAN, NAN, 1.0]]
    groups = [[judged(None if t != t else t, 0.0) for t in group] for group in totals]
    pushed = [[one.old_push for one in group] for group in with_pushes(groups, baseline)]
    expected = advantages(torch.tensor(totals, dtype=torch.float64), kind)
    assert pushed == expected.where(expected.abs() > 1e-9, 0.0).sign().int().tolist()


def test_the_batch_is_a_step():
    groups = [
        [judged(0.0, 0.0, step=1), judged(0.0, 0.0, step=1)],
        [judged(1.0, 1.0, step=2), judged(1.0, 0.0, step=2)],
    ]
    batch = [[one.new_push for one in group] for group in with_pushes(groups, "batch")]
    assert batch == [[0, 0], [1, -1]]


def test_the_forecast_counts_silent_groups_and_turned_completions():
    groups = [[judged(0.0, 1.0), judged(1.0, 0.0)], [judged(0.0, 1.0), judged(0.0, 1.0)], [judged(0.0, 1.0)] * 2]
    found = forecast(with_pushes(groups, "group"))
    assert (found.groups, found.without_signal_old, found.without_signal_new) == (3, 2, 2)
    assert (found.completions, found.flipped) == (6, 2)


def test_a_comparison_has_every_number():
    old = [ok(float(value)) for value in range(10)]
    new = [ok(value / 2, seconds=value / 100) for value in range(9)] + [ok(None, outcome="timeout")]
    rows = [judged(None, None, old={"f": o}, new={"f": n}) for o, n in zip(old, new, strict=True)]
    (found,) = comparisons(rows, change("f"))
    assert found.old and found.new and found.histogram
    assert (found.old.count, found.old.mean, found.old.lowest, found.old.highest) == (10, 4.5, 0.0, 9.0)
    assert (found.new.count, found.new.missing, found.new.failed, found.new.mean) == (9, 1, 1, 2.0)
    assert (found.new.seconds_p50, found.new.seconds_max) == (pytest.approx(0.05, abs=0.011), 0.1)
    assert found.differing == 9, "the first one is 0 in both"
    assert len(found.histogram.edges) == BINS + 1 and found.histogram.edges[-1] == 9
    assert (sum(found.histogram.old), sum(found.histogram.new)) == (10, 9)
    assert (found.histogram.old[0], found.histogram.old[-1], found.histogram.new[-1]) == (1, 1, 0)


def test_one_value_is_one_bar_and_none_is_no_histogram():
    (same,) = comparisons([judged(None, None, old={"f": ok(0.3)}, new={"f": ok(0.3)})], change("f"))
    assert same.histogram and (same.histogram.old, same.histogram.new) == ([1], [1])
    (none,) = comparisons([judged(None, None, old={"f": ok(None)}, new={"f": ok(None)})], change("f"))
    assert none.histogram is None and none.new and none.new.mean is None
    assert total_comparison([judged(None, None)]).old == wire.ScoreSummary(count=0, missing=1)


def test_the_largest_changes_come_first_and_are_cut():
    rows = [judged(0.0, float(value)) for value in range(MOST_CHANGES + 20)] + [judged(1.0, None)]
    found = row_changes(rows)
    assert len(found) == MOST_CHANGES and found[0].new_total is None
    assert [one.new_total for one in found[1:3]] == [MOST_CHANGES + 19, MOST_CHANGES + 18]
    long = Judged(stored(completion="x" * 9000), {}, {}, 0.0, 1.0)
    assert len(row_changes([long])[0].completion) < 2100


def test_failures_that_differ_in_numbers_are_one():
    error = 'Traceback (most recent call last):\n  File "f", line 2\nValueError: no number in 0x7f{0} after {0}'
    rows = [judged(0, 0, new={"f": ok(0.0, outcome="exception", error=error.format(n))}) for n in (10, 20)]
    rows += [judged(0, 0, new={"f": ok(0.0, outcome="timeout", error="no result after 5 s\nstack 1")})]
    rows += [judged(0, 0, new={"stored": ok(0.0, outcome="crash", error="old")})]
    found = failures(rows, frozenset({"f"}))
    assert [(one.outcome, one.count) for one in found] == [("exception", 2), ("timeout", 1)]
    assert found[0].error == error.format(10)


def test_what_to_look_at_is_said_in_words():
    slow = [judged(0, 0, new={"f": ok(1.0, seconds=2.0)}) for _ in range(4)]
    failing = ok(0.0, outcome="exception", error="x")
    signal = wire.SignalForecast(groups=4, without_signal_old=1, without_signal_new=3, completions=8, flipped=2)

    def said(rows: list[Judged], what: Change, forecast: wire.SignalForecast = signal) -> str:
        return "\n".join(findings(what, comparisons(rows, what), forecast))

    text = said(slow, change("f"))
    assert "f gives 1 to every completion" in text and "f takes 2.0 s or more in one of 20 calls" in text
    assert "3 of 4 groups would give no signal, 2 more than now" in text
    assert "2 of 8 completions would be pushed the other way" in text
    rows = [judged(0, 0, new={"f": failing}), *slow]
    assert "f failed in 1 of 5 calls\n" in said(rows, change("f"))
    assert "failed in 2 of 6 calls; a job pauses when it fails that often" in said([rows[0], *rows], change("f"))
    assert "1 of 5 calls; with on_error='fail' the first one would end" in said(rows, change("f", on_error="fail"))
    quiet = wire.SignalForecast(groups=4, without_signal_old=1, without_signal_new=1, completions=8, flipped=0)
    alike = [judged(0, 0, old={"f": ok(n / 2)}, new={"f": ok(n / 2)}) for n in range(3)]
    assert said(alike, change("f"), quiet) == "no score differs from the stored one"
