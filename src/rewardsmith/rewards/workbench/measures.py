"""The arithmetic of the workbench: pure functions on values by group (P groups, G completions each), None for no value.

Groups count from two completions up: one alone has nothing to be compared with. What a group without signal is, is what
`train.grpo.zero_signal` says it is (a test holds the two together); there it is tensors, here nothing needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev, variance
from typing import Literal

Value = float | None
Values = Sequence[Sequence[Value]]
Basis = Literal["measured", "estimated", "at most"]

TOTAL = "total_reward"  # the weighted sum, where functions are named; no function may have that name
SAME = 1e-9  # values this close are the same number but for rounding
NEAR_BEST = 0.9  # of the way from the lowest score to the best: from here on one counts as good as the best


def same(one: float, other: float) -> bool:
    return abs(one - other) <= SAME * max(1.0, abs(one), abs(other))


def known(values: Iterable[Value]) -> list[float]:
    return [value for value in values if value is not None]


def comparable(values_PG: Values) -> list[Sequence[Value]]:
    """The groups of two completions or more."""
    return [values for values in values_PG if len(values) > 1]


def silent(values_G: Sequence[Value]) -> bool:
    """Whether a group teaches nothing: fewer than two values, or all the same."""
    values = known(values_G)
    return len(values) < 2 or same(min(values), max(values))


def counts(values: Sequence[float]) -> list[int]:
    """How often each different value occurs, the lowest first."""
    found: list[int] = []
    first = -math.inf
    for value in sorted(values):
        if found and same(first, value):
            found[-1] += 1
        else:
            found.append(1)
            first = value
    return found


def chance_of_silence(values_G: Sequence[Value], size: int) -> float:
    """The chance that a group of `size` completions like these teaches nothing.

    Up to the size of the group: the share of its parts of `size` completions that are silent, which is right on
    average. Beyond: the sum over the different values of (their share)^size, as if further completions repeated these
    ones; on average that is too high, never too low. A completion without a value goes with every value.
    """
    number = len(values_G)
    different = counts(known(values_G))
    missing = number - sum(different)

    def only(kept: int) -> float:
        if size <= number:
            return math.comb(kept, size) / math.comb(number, size)
        return (kept / number) ** size

    if not different:
        return 1.0
    # Groups without any value would be counted once for each different value.
    return sum(only(count + missing) for count in different) - (len(different) - 1) * only(missing)


def share_of_silence(values_PG: Values, size: int) -> tuple[Value, Basis | None]:
    """The share of groups of `size` completions that teach nothing, and how well it is known."""
    groups = comparable(values_PG)
    if not groups:
        return None, None
    share = fmean(chance_of_silence(values, size) for values in groups)
    if any(len(values) < size for values in groups):
        return share, "at most"
    return share, "measured" if all(len(values) == size for values in groups) else "estimated"


def share_of_constant(values_PG: Values) -> Value:
    """Of the groups as they are."""
    groups = comparable(values_PG)
    return fmean(silent(values) for values in groups) if groups else None


def shares_at_the_ends(values_PG: Values) -> tuple[Value, Value]:
    """The shares of groups whose values are all the lowest of all, and all the highest of all."""
    groups = comparable(values_PG)
    everything = [value for values in groups for value in known(values)]
    if not everything or same(min(everything), max(everything)):
        return None, None
    lowest, highest = min(everything), max(everything)

    def share(end: float) -> float:
        return fmean(bool(known(values)) and all(same(value, end) for value in known(values)) for values in groups)

    return share(lowest), share(highest)


def spread(values_PG: Values) -> Value:
    """The mean over groups of their standard deviation (n - 1, as training divides by)."""
    deviations = [stdev(values) for group in values_PG if len(values := known(group)) > 1]
    return fmean(deviations) if deviations else None


def percentile(numbers: Sequence[float], share: float) -> float:
    """The number below which `share` of them are, by nearest rank; there has to be one."""
    return sorted(numbers)[round(share * (len(numbers) - 1))]


def rank_correlation(one_PG: Values, other_PG: Values) -> tuple[Value, int]:
    """Spearman's correlation of two functions within groups, pooled, and the number of groups it rests on.

    Ranks are taken group by group, since training compares within groups only: rows that both find hard do not
    count as agreement. Groups in which either is constant have nothing to say.
    """
    products = ones = others = 0.0
    groups = 0
    for one_G, other_G in zip(one_PG, other_PG, strict=True):
        pairs = [(a, b) for a, b in zip(one_G, other_G, strict=True) if a is not None and b is not None]
        one, other = _centred_ranks([a for a, _ in pairs]), _centred_ranks([b for _, b in pairs])
        if not any(one) or not any(other):
            continue
        groups += 1
        products += sum(a * b for a, b in zip(one, other, strict=True))
        ones += sum(a * a for a in one)
        others += sum(b * b for b in other)
    return (products / math.sqrt(ones * others), groups) if groups else (None, 0)


def _centred_ranks(values: Sequence[float]) -> list[float]:
    """Ranks less their mean; equal values share the mean of their ranks."""
    rank_of: dict[float, float] = {}
    before = 0
    for value in sorted(set(values)):
        count = values.count(value)
        rank_of[value] = before + (count - 1) / 2
        before += count
    middle = (len(values) - 1) / 2
    return [rank_of[value] - middle for value in values]


def noise(first_PG: Values, again_PG: Values) -> Value:
    """The share of the variance within groups that is chance: half the mean squared difference of two scorings of the
    same completions, divided by the mean variance of the groups. At most 1; None where the groups do not vary.
    """
    squares = [
        (a - b) ** 2
        for first_G, again_G in zip(first_PG, again_PG, strict=True)
        for a, b in zip(first_G, again_G, strict=True)
        if a is not None and b is not None
    ]
    variances = [variance(values) for group in first_PG if len(values := known(group)) > 1]
    if not squares or not variances or not (within := fmean(variances)):
        return None
    return min(1.0, fmean(squares) / 2 / within)


def seconds_per_step(mean_seconds: Iterable[float], completions: int, workers: int) -> float:
    """Of scoring one step: every function once for each of its completions, shared among the workers."""
    return completions * sum(mean_seconds) / workers


def ends(
    completions: Sequence[float], reference: Sequence[float], everything: Sequence[float]
) -> tuple[float, float] | None:
    """The lowest score of all, and the best that a completion, or the reference, got. Where these never got off the
    ground, the best is whatever did.

    None where there is nothing to compare with: all scores are the same, or there are no completions and the
    reference is worth nothing.
    """
    if not everything:
        return None
    lowest, best = min(everything), max([*completions, *reference], default=-math.inf)
    if best == -math.inf or same(best, lowest):
        best = max(everything) if completions else lowest
    return None if same(best, lowest) else (lowest, best)


def merit(value: float, between: tuple[float, float]) -> float:
    """How far on the way from the lowest score to the best: 0 to 1, or above where it is better than the best."""
    lowest, best = between
    return (value - lowest) / (best - lowest)
