import math
from typing import get_args

import pytest
import torch

from rewardsmith.config import Advantage
from rewardsmith.rewards.outcomes import LARGEST_TOTAL
from rewardsmith.train.grpo import advantages, soft_punishment, weights, zero_signal

NAN = math.nan
KINDS = get_args(Advantage)
BY_GROUP = [kind for kind in KINDS if kind != "reinforce_pp"]


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(left: torch.Tensor, right: list) -> bool:
    return torch.allclose(left, torch.tensor(right, dtype=left.dtype), atol=1e-5)


def test_group_mean_is_the_distance_to_the_mean_of_the_group():
    assert close(
        advantages(table([1, 0, 0, 1], [3, 1, 1, 1]), "group_mean"), [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]]
    )


def test_group_std_divides_by_the_sample_deviation_of_the_group():
    # Deviations 0.5, -0.5, -0.5, 0.5: variance 1 / 3. Deviations 1.5, -0.5 * 3: variance 3 / 3.
    root = math.sqrt(3)
    expected = [[0.5 * root, -0.5 * root, -0.5 * root, 0.5 * root], [1.5, -0.5, -0.5, -0.5]]
    assert close(advantages(table([1, 0, 0, 1], [3, 1, 1, 1]), "group_std"), expected)


def test_batch_std_divides_by_the_sample_deviation_of_all_totals():
    # 0, 2, 4, 4: mean 2.5, squares 6.25 + 0.25 + 2.25 + 2.25 = 11, variance 11 / 3. The second group has no signal.
    std = math.sqrt(11 / 3)
    assert close(advantages(table([0, 2], [4, 4]), "batch_std"), [[-1 / std, 1 / std], [0, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_without_a_total_stands_outside_its_group(kind):
    with_hole = advantages(table([1, NAN, 0, 3], [5, 2, 2, 0]), kind)
    assert with_hole[0, 1] == 0
    assert torch.isfinite(with_hole).all()
    if kind in ("group_std", "group_mean", "rloo"):
        assert torch.allclose(with_hole[0, [0, 2, 3]], advantages(table([1, 0, 3]), kind)[0])


@pytest.mark.parametrize("kind", BY_GROUP)
def test_groups_without_signal_get_zeros_and_never_nan(kind):
    totals = table([2, 2, 2], [NAN, NAN, NAN], [NAN, 1, NAN], [0.1 + 0.2, 0.3, 0.3], [0, 0, 1])
    assert zero_signal(totals, kind).tolist() == [True, True, True, True, False]
    result = advantages(totals, kind)
    assert torch.equal(result[:4], torch.zeros(4, 3, dtype=torch.float64))
    assert torch.isfinite(result).all() and result[4].abs().min() > 0


def test_nothing_at_all_gives_nothing():
    for kind in KINDS:
        assert advantages(table([NAN, NAN]), kind).tolist() == [[0, 0]]
    assert weights(torch.tensor([3, 4]), torch.tensor([False, False]), "grpo", 8).tolist() == [0, 0]


def test_small_differences_are_a_signal():
    assert not zero_signal(table([1e-3, 2e-3]))[0]
    assert not zero_signal(table([1000.0, 1000.001]))[0]


def test_rloo_is_the_distance_to_the_mean_of_the_others():
    # 1 against (0 + 2) / 2, 0 against 1.5, 2 against 0.5; the second group has two totals only.
    found = advantages(table([1, 0, 2], [5, NAN, 3]), "rloo")
    assert close(found, [[0, -1.5, 1.5], [2, 0, -2]])


def test_reinforce_pp_whitens_the_whole_batch():
    # 0, 2, 4, 4: mean 2.5, variance 11 / 3. A group of equal totals has a signal: both are above the batch's mean.
    std = math.sqrt(11 / 3)
    found = advantages(table([0, 2], [4, 4]), "reinforce_pp")
    assert close(found, [[-2.5 / std, -0.5 / std], [1.5 / std, 1.5 / std]])
    assert zero_signal(table([0, 2], [4, 4]), "reinforce_pp").tolist() == [False, False]


def test_reinforce_pp_baseline_whitens_the_distances_to_the_groups_means():
    # -1, 1 and -3, 3 after the groups' means, 0, 0 in the third: squares add up to 20, variance 20 / 5.
    found = advantages(table([0, 2], [1, 7], [4, 4]), "reinforce_pp_baseline")
    assert close(found, [[-1 / 2, 1 / 2], [-3 / 2, 3 / 2], [0, 0]])
    assert zero_signal(table([0, 2], [1, 7], [4, 4]), "reinforce_pp_baseline").tolist() == [False, False, True]


def test_what_has_no_signal_for_reinforce_pp():
    # The mean is 0.3 within rounding: the second group is exactly there, the third has one total that is not.
    totals = table([0.1 + 0.2 - 0.3, 0.6], [0.1 + 0.2, 0.3], [NAN, 0.3], [NAN, NAN], [0.0, 0.6])
    assert zero_signal(totals, "reinforce_pp").tolist() == [False, True, True, True, False]
    found = advantages(totals, "reinforce_pp")
    assert torch.equal(found[1:4], torch.zeros(3, 2, dtype=torch.float64))
    assert found[0, 0] < 0 < found[0, 1] and torch.isfinite(found).all()
    # One total is nothing to compare, all the same neither; one that differs from other groups is a signal.
    for nothing in (table([NAN, 3.0]), table([0.1 + 0.2, 0.3], [0.3, 0.3]), table([1000.1, 1000.1])):
        assert zero_signal(nothing, "reinforce_pp").all()
        assert not advantages(nothing, "reinforce_pp").any()
    assert not zero_signal(table([NAN, 1.0], [0.0, 0.0]), "reinforce_pp").any()
    assert close(advantages(table([NAN, 1.0], [0.0, NAN]), "reinforce_pp"), [[0, 0.5**0.5], [-(0.5**0.5), 0]])


def test_soft_punishment_by_hand():
    lengths, cut = torch.tensor([10, 16, 18, 20, 20, 3]), torch.tensor([False, False, False, False, True, True])
    assert close(soft_punishment(lengths, cut, max_tokens=20, buffer=4), [0, 0, -0.5, -1, -1, -1])
    # A buffer larger than what there is: it begins at the first token.
    assert close(soft_punishment(torch.tensor([1, 5]), torch.tensor([False, False]), 10, 40), [-0.1, -0.5])


def test_weights_by_hand():
    lengths, counted = torch.tensor([2, 5, 3]), torch.tensor([True, True, True])
    for loss in ("grpo", "gspo", "sapo"):
        assert close(weights(lengths, counted, loss, 10), [1 / 6, 1 / 15, 1 / 9])
    for loss in ("dapo", "bnpo", "cispo"):
        assert close(weights(lengths, counted, loss, 10), [0.1, 0.1, 0.1])
    assert close(weights(lengths, counted, "dr_grpo", 10), [1 / 30, 1 / 30, 1 / 30])


def test_completions_without_a_total_are_in_no_denominator():
    lengths, counted = torch.tensor([2, 5, 3]), torch.tensor([True, False, True])
    assert close(weights(lengths, counted, "grpo", 10), [1 / 4, 0, 1 / 6])
    assert close(weights(lengths, counted, "dapo", 10), [0.2, 0, 0.2])
    assert close(weights(lengths, counted, "dr_grpo", 10), [1 / 20, 0, 1 / 20])


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_of_the_largest_totals_are_finite(kind: str):
    big = LARGEST_TOTAL
    found = advantages(torch.tensor([[-big, big, big, 0.0], [0.0, 1.0, big, math.nan]], dtype=torch.float64), kind)
    assert found.isfinite().all() and found[0, 0] < 0 < found[0, 1]
