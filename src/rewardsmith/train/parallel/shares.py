"""Dividing a step's completions among ranks: contiguous shares of about equal cost, groups whole where that is fair.

Pure functions of the costs, so the same step is divided the same way each time: a resumed job repeats its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

UNEVEN = 0.1  # of a share's cost: so much may a share be off for a group to stay whole


@dataclass(frozen=True)
class Slice:
    """Completions `start` to `stop` of group `group`."""

    group: int
    start: int
    stop: int


def shares(costs: Sequence[Sequence[float]], ranks: int) -> list[list[Slice]]:
    """For each rank its slices, in order. `costs` are those of each group's completions; a share may be empty.

    All completions stand in one line, which is cut at equal parts of the cost, or at the border of a group close by.
    """
    line = [(group, n) for group, group_costs in enumerate(costs) for n in range(len(group_costs))]
    upto = [0.0, *accumulate(cost for group_costs in costs for cost in group_costs)]
    part = upto[-1] / ranks
    borders = [0, *accumulate(len(group_costs) for group_costs in costs)]
    cuts = [0]
    for rank in range(1, ranks):
        wanted = part * rank
        border = min(borders, key=lambda place: abs(upto[place] - wanted))
        exact = min(range(len(upto)), key=lambda place: abs(upto[place] - wanted))
        cut = border if abs(upto[border] - wanted) <= UNEVEN * part else exact
        cuts.append(max(cut, cuts[-1]))
    cuts.append(len(line))
    return [_slices(line[start:stop]) for start, stop in pairwise(cuts)]


def _slices(places: Sequence[tuple[int, int]]) -> list[Slice]:
    slices: list[Slice] = []
    for group, n in places:
        if slices and slices[-1].group == group:
            slices[-1] = Slice(group, slices[-1].start, n + 1)
        else:
            slices.append(Slice(group, n, n + 1))
    return slices
