import math

import pytest
import torch

from rewardsmith.rewards.outcomes import LARGEST_TOTAL
from rewardsmith.train.grpo import advantages, k3, policy_losses, weights, zero_signal

NAN = math.nan


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


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "batch_std"])
def test_a_completion_without_a_total_stands_outside_its_group(kind):
    with_hole = advantages(table([1, NAN, 0, 3], [5, 2, 2, 0]), kind)
    assert with_hole[0, 1] == 0
    assert torch.isfinite(with_hole).all()
    if kind != "batch_std":
        assert torch.allclose(with_hole[0, [0, 2, 3]], advantages(table([1, 0, 3]), kind)[0])


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "batch_std"])
def test_groups_without_signal_get_zeros_and_never_nan(kind):
    totals = table([2, 2, 2], [NAN, NAN, NAN], [NAN, 1, NAN], [0.1 + 0.2, 0.3, 0.3], [0, 0, 1])
    assert zero_signal(totals).tolist() == [True, True, True, True, False]
    result = advantages(totals, kind)
    assert torch.equal(result[:4], torch.zeros(4, 3, dtype=torch.float64))
    assert torch.isfinite(result).all() and result[4].abs().min() > 0


def test_nothing_at_all_gives_nothing():
    assert advantages(table([NAN, NAN]), "batch_std").tolist() == [[0, 0]]
    assert weights(torch.tensor([3, 4]), torch.tensor([False, False]), "grpo", 8).tolist() == [0, 0]


def test_small_differences_are_a_signal():
    assert not zero_signal(table([1e-3, 2e-3]))[0]
    assert not zero_signal(table([1000.0, 1000.001]))[0]


def test_the_surrogate_is_the_smaller_of_the_ratio_and_the_clipped_ratio():
    old = torch.zeros(6)
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.0, 1.5, 0.5])
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    losses = policy_losses(ratio.log(), old, advantage, clip_low=0.2, clip_high=0.3)
    # A > 0: 2, 1.3 * 2 (clipped), 0.5 * 2. A < 0: -2, -3, -2 * 0.8 (clipped). Minimised, hence the sign.
    assert close(losses, [-2, -2.6, -1, 2, 3, 1.6])


def test_clipped_tokens_have_no_gradient():
    logps = torch.tensor([1.5, 0.5]).log().requires_grad_()
    policy_losses(logps, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2, 0.2).sum().backward()
    assert logps.grad.tolist() == [0, 0]


def test_on_policy_the_gradient_is_minus_the_advantage():
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    policy_losses(logps, logps.detach(), torch.tensor([3.0, -4.0]), 0.2, 0.2).sum().backward()
    assert logps.grad.tolist() == [-3, 4]


def test_k3_by_hand():
    own, reference = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0 + math.log(2)])
    assert close(k3(own, reference), [0.0, 2 - 1 - math.log(2)])


def test_k3_estimates_the_divergence_of_two_distributions():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 12, generator=generator).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    drawn = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    assert k3(p, q).min() >= 0
    assert abs(k3(p[drawn], q[drawn]).mean() - exact) < 0.02


def test_weights_by_hand():
    lengths, counted = torch.tensor([2, 5, 3]), torch.tensor([True, True, True])
    assert close(weights(lengths, counted, "grpo", 10), [1 / 6, 1 / 15, 1 / 9])
    assert close(weights(lengths, counted, "dapo", 10), [0.1, 0.1, 0.1])
    assert close(weights(lengths, counted, "bnpo", 10), [0.1, 0.1, 0.1])
    assert close(weights(lengths, counted, "dr_grpo", 10), [1 / 30, 1 / 30, 1 / 30])


def test_completions_without_a_total_are_in_no_denominator():
    lengths, counted = torch.tensor([2, 5, 3]), torch.tensor([True, False, True])
    assert close(weights(lengths, counted, "grpo", 10), [1 / 4, 0, 1 / 6])
    assert close(weights(lengths, counted, "dapo", 10), [0.2, 0, 0.2])
    assert close(weights(lengths, counted, "dr_grpo", 10), [1 / 20, 0, 1 / 20])


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "batch_std"])
def test_advantages_of_the_largest_totals_are_finite(kind: str):
    big = LARGEST_TOTAL
    found = advantages(torch.tensor([[-big, big, big, 0.0], [0.0, 1.0, big, math.nan]], dtype=torch.float64), kind)
    assert found.isfinite().all() and found[0, 0] < 0 < found[0, 1]
