"""The arithmetic, against numbers worked out by hand."""

import math
import random

import pytest
import torch

from rewardsmith.rewards.workbench.measures import (
    chance_of_silence,
    counts,
    ends,
    merit,
    noise,
    percentile,
    rank_correlation,
    seconds_per_step,
    share_of_constant,
    share_of_silence,
    shares_at_the_ends,
    silent,
    spread,
)
from rewardsmith.train.grpo import zero_signal


def test_a_group_without_signal_is_what_training_takes_it_for() -> None:
    rng = random.Random(0)
    values = (0.0, 1.0, 1.0 + 1e-12, 0.1 + 0.2, 0.3, 1e9, 1e9 + 0.1, 1e9 + 10.0, -0.5, None)
    for _ in range(500):
        group = rng.choices(values, k=rng.randrange(1, 5))
        totals_PG = torch.tensor([[math.nan if v is None else v for v in group]], dtype=torch.float64)
        assert silent(group) == bool(zero_signal(totals_PG)), group


def test_values_that_differ_by_rounding_are_one() -> None:
    assert counts([0.3, 0.1 + 0.2, 1.0, 0.0, 0.3]) == [1, 3, 1]
    assert counts([]) == []


def test_the_chance_of_silence_up_to_the_size_of_the_group() -> None:
    # One right of four. Of the 6 pairs, the 3 without it are silent; of the 4 triples, 1; the whole group is not.
    group = [1.0, 0.0, 0.0, 0.0]
    assert chance_of_silence(group, 2) == pytest.approx(3 / 6)
    assert chance_of_silence(group, 3) == pytest.approx(1 / 4)
    assert chance_of_silence(group, 4) == 0.0
    # Two and two: 1 pair of each, of 6.
    assert chance_of_silence([0.0, 0.0, 1.0, 1.0], 2) == pytest.approx(2 / 6)


def test_the_chance_of_silence_beyond_the_size_of_the_group() -> None:
    assert chance_of_silence([1.0, 0.0, 0.0, 0.0], 16) == pytest.approx(0.25**16 + 0.75**16)
    assert chance_of_silence([0.5, 0.5], 16) == 1.0
    assert chance_of_silence([0.0, 1.0], 8) == pytest.approx(2 * 0.5**8)


def test_a_completion_without_a_value_goes_with_every_value() -> None:
    # Values a, b and one without: pairs (a, b) speak, (a, -) and (b, -) have one value only.
    assert chance_of_silence([0.0, 1.0, None], 2) == pytest.approx(2 / 3)
    assert chance_of_silence([0.0, 1.0, None], 3) == 0.0
    # Each drawn of three kinds: {a, -} or {b, -}, of which {-} is in both.
    assert chance_of_silence([0.0, 1.0, None], 4) == pytest.approx(2 * (2 / 3) ** 4 - (1 / 3) ** 4)
    assert chance_of_silence([None, None], 5) == 1.0


def test_at_the_group_s_own_size_the_chance_is_what_is_there() -> None:
    rng = random.Random(1)
    for _ in range(300):
        group = rng.choices((0.0, 0.5, 1.0, None), k=rng.randrange(2, 6))
        assert chance_of_silence(group, len(group)) == float(silent(group)), group


def test_the_share_of_groups_without_signal_says_how_well_it_is_known() -> None:
    groups = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    assert share_of_silence(groups, 4) == (0.5, "measured")
    assert share_of_silence(groups, 2) == (pytest.approx(0.75), "estimated")
    share, basis = share_of_silence(groups, 8)
    assert basis == "at most" and share == pytest.approx((1 + 0.25**8 + 0.75**8) / 2)
    assert share_of_silence([*groups, [1.0, 0.0]], 4)[1] == "at most"
    assert share_of_silence([[1.0], []], 4) == (None, None)
    assert share_of_silence([[1.0, 0.0], [0.0]], 2) == (0.0, "measured"), "one completion is no group"


def test_beyond_the_group_s_size_the_share_is_never_too_low_on_average() -> None:
    """Groups of 4 of a coin that falls on 1 in three of ten; what groups of 8 would do is known exactly."""
    rng = random.Random(2)
    groups = [[float(rng.random() < 0.3) for _ in range(4)] for _ in range(4000)]
    exact = 0.3**8 + 0.7**8
    assert share_of_silence(groups, 8)[0] > exact + 0.1  # type: ignore[operator]
    assert share_of_silence(groups, 2)[0] == pytest.approx(0.3**2 + 0.7**2, abs=0.02)


def test_constant_groups_and_those_at_the_ends() -> None:
    groups = [[0.0, 0.0], [1.0, 1.0, None], [0.0, 1.0], [0.5, 0.5], [None, None], [1.0]]
    assert share_of_constant(groups) == pytest.approx(4 / 5)
    assert shares_at_the_ends(groups) == (pytest.approx(1 / 5), pytest.approx(1 / 5))
    assert shares_at_the_ends([[1.0, 1.0], [1.0, 1.0]]) == (None, None)
    assert share_of_constant([]) is None


def test_spread_is_the_mean_deviation_within_groups() -> None:
    # 0 and 1: sqrt(1/2); 0, 0 and 3: squares 1 + 1 + 4, over 2; the last has one value.
    assert spread([[0.0, 1.0], [0.0, 0.0, 3.0], [5.0, None]]) == pytest.approx((math.sqrt(0.5) + math.sqrt(3)) / 2)
    assert spread([[1.0]]) is None


def test_percentiles_are_by_nearest_rank() -> None:
    numbers = [float(number) for number in range(100, 0, -1)]
    assert [percentile(numbers, share) for share in (0.0, 0.5, 0.95, 0.99, 1.0)] == [1.0, 51.0, 95.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0


def test_rank_correlation_within_groups() -> None:
    assert rank_correlation([[1.0, 2.0, 3.0]], [[10.0, 20.0, 400.0]]) == (pytest.approx(1.0), 1)
    assert rank_correlation([[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]]) == (pytest.approx(-1.0), 1)
    # Ranks less their mean: -1.5, -0.5, 0.5, 1.5 against -1.5, 0.5, -0.5, 1.5: 4 of 5.
    assert rank_correlation([[1.0, 2.0, 3.0, 4.0]], [[1.0, 3.0, 2.0, 4.0]]) == (pytest.approx(0.8), 1)
    # Equal values share a rank: -1, 0.5, 0.5 against -0.5, -0.5, 1: 0.75 of sqrt(1.5 * 1.5).
    assert rank_correlation([[0.0, 1.0, 1.0]], [[0.0, 0.0, 1.0]]) == (pytest.approx(0.5), 1)


def test_rank_correlation_pools_groups_and_passes_over_those_that_say_nothing() -> None:
    one = [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, None], [2.0, 3.0, 4.0]]
    other = [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [5.0, 6.0, 9.0]]
    # Products 0.5, -0.5 and 2, of squares 0.5, 0.5 and 2 on both sides.
    assert rank_correlation(one, other) == (pytest.approx(2 / 3), 3)
    # A row that both find hard is no agreement: between groups nothing is compared.
    assert rank_correlation([[0.0, 1.0], [10.0, 11.0]], [[1.0, 0.0], [11.0, 10.0]]) == (pytest.approx(-1.0), 2)
    assert rank_correlation([[1.0, 1.0]], [[0.0, 1.0]]) == (None, 0)


def test_noise_is_the_share_of_the_spread_that_is_chance() -> None:
    # Within: variance 0.5. Differences 0.2 and 0: mean square 0.02, half of it 0.01.
    assert noise([[0.0, 1.0]], [[0.2, 1.0]]) == pytest.approx(0.01 / 0.5)
    assert noise([[0.0, 1.0]], [[1.0, 0.0]]) == 1.0
    assert noise([[0.0, 1.0, None]], [[0.0, 1.0, 3.0]]) == 0.0
    assert noise([[1.0, 1.0]], [[1.0, 0.0]]) is None
    assert noise([], []) is None


def test_seconds_of_a_step() -> None:
    assert seconds_per_step([0.01, 0.03], completions=64, workers=4) == pytest.approx(0.64)


def test_the_lowest_and_the_best_that_probes_are_measured_by() -> None:
    assert ends([0.0, 1.0], [], [0.0, 1.0, 0.2]) == (0.0, 1.0)
    # A probe that is below all completions is the lowest; the reference may be the best.
    assert ends([0.5, 0.6], [1.0], [0.5, 0.6, 1.0, -1.0]) == (-1.0, 1.0)
    # A probe that is above all completions is not: it is as good as the best and more.
    assert ends([0.0, 0.5], [], [0.0, 0.5, 3.0]) == (0.0, 0.5)
    # Completions and reference that never got off the ground: whatever did is the best.
    assert ends([0.0, 0.0], [0.0], [0.0, 0.0, 1.0]) == (0.0, 1.0)


def test_without_anything_to_compare_with_there_are_no_ends() -> None:
    assert ends([], [], []) is None
    assert ends([1.0, 1.0], [1.0], [1.0, 1.0, 1.0]) is None
    assert ends([], [0.0], [0.0, 1.0]) is None, "no completions, and a reference that earns nothing"
    assert ends([], [], [0.0, 1.0]) is None
    assert ends([], [1.0], [0.0, 1.0]) == (0.0, 1.0)


def test_merit_is_the_way_from_the_lowest_to_the_best() -> None:
    assert [merit(value, (-1.0, 1.0)) for value in (-1.0, 0.5, 1.0, 2.0)] == [0.0, 0.75, 1.0, 1.5]
