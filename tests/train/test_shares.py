"""How a step is divided among ranks."""

import random

from rewardsmith.train.parallel.shares import Slice, shares


def test_whole_groups_where_that_is_even():
    assert shares([[1.0] * 4] * 4, 2) == [[Slice(0, 0, 4), Slice(1, 0, 4)], [Slice(2, 0, 4), Slice(3, 0, 4)]]


def test_one_group_is_cut_among_all_ranks():
    assert shares([[1.0] * 16], 2) == [[Slice(0, 0, 8)], [Slice(0, 8, 16)]]


def test_a_group_is_cut_only_when_shares_would_be_uneven():
    assert shares([[1.0] * 4] * 3, 2) == [[Slice(0, 0, 4), Slice(1, 0, 2)], [Slice(1, 2, 4), Slice(2, 0, 4)]]
    assert shares([[1.0] * 10, [1.0] * 9], 2) == [[Slice(0, 0, 10)], [Slice(1, 0, 9)]]


def test_costs_decide_and_not_counts():
    assert shares([[8.0], [1.0] * 4, [1.0] * 4], 2) == [[Slice(0, 0, 1)], [Slice(1, 0, 4), Slice(2, 0, 4)]]


def test_fewer_completions_than_ranks_leave_ranks_empty():
    divided = shares([[1.0], [1.0]], 4)
    assert sorted(s.group for share in divided for s in share) == [0, 1]
    assert len(divided) == 4


def test_nothing_to_do():
    assert shares([], 2) == [[], []]


def test_every_completion_once_and_in_order():
    random.seed(4)
    for _ in range(200):
        costs = [[random.random() for _ in range(random.randint(1, 9))] for _ in range(random.randint(1, 9))]
        ranks = random.randint(1, 5)
        divided = shares(costs, ranks)
        flat = [(s.group, n) for share in divided for s in share for n in range(s.start, s.stop)]
        assert flat == [(g, n) for g, group in enumerate(costs) for n in range(len(group))]
        spent = [sum(costs[s.group][n] for s in share for n in range(s.start, s.stop)) for share in divided]
        largest = max(cost for group in costs for cost in group)
        fair = sum(map(sum, costs)) / ranks
        assert max(spent) <= fair * (1 + 2 * 0.1) + 2 * largest
