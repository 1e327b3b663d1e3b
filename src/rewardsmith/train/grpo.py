"""The mathematics of GRPO: advantages, token losses, aggregation, KL. Pure functions on tensors, no model, no state.

Totals come in as P prompts x G completions; a completion without a total (NaN) stands outside its group. A loss is a
weighted sum over tokens whose weights depend on the whole batch and on nothing else, so the gradient is the same for
any split into micro-batches. Formulas: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), Lite-PPO
(2508.08221), k3 (Schulman 2020).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Advantage = Literal["group_std", "group_mean", "batch_std"]
Loss = Literal["grpo", "bnpo", "dr_grpo", "dapo"]

EPSILON = 1e-6
SAME = 1e-9  # totals this close are the same number but for rounding


def zero_signal(totals_PG: Tensor) -> Tensor:
    """Which groups teach nothing, as booleans: fewer than two totals, or all totals the same."""
    valid_PG = ~totals_PG.isnan()
    highest_P = totals_PG.masked_fill(~valid_PG, -torch.inf).amax(1)
    lowest_P = totals_PG.masked_fill(~valid_PG, torch.inf).amin(1)
    scale_P = torch.maximum(highest_P.abs(), lowest_P.abs()).clamp(min=1.0)
    return (valid_PG.sum(1) < 2) | (highest_P - lowest_P <= SAME * scale_P)


def advantages(totals_PG: Tensor, kind: Advantage) -> Tensor:
    """How much better each completion is than its group: finite, 0 without a total and in zero-signal groups.

    "group_mean": total - mean of the group. "group_std": divided by the group's standard deviation. "batch_std":
    divided by the standard deviation of all totals of the batch. Standard deviations are those of samples (n - 1).
    """
    valid_PG = ~totals_PG.isnan()
    known_PG = totals_PG.masked_fill(~valid_PG, 0.0)
    count_P1 = valid_PG.sum(1, keepdim=True)
    mean_P1 = known_PG.sum(1, keepdim=True) / count_P1.clamp(min=1)
    above_PG = (known_PG - mean_P1).masked_fill(~valid_PG, 0.0)
    if kind == "group_std":
        std_P1 = (above_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)).sqrt()
        above_PG = above_PG / (std_P1 + EPSILON)
    elif kind == "batch_std":
        totals_N = totals_PG[valid_PG]
        std = totals_N.std() if len(totals_N) > 1 else totals_N.new_zeros(())
        above_PG = above_PG / (std + EPSILON)
    return above_PG.masked_fill(zero_signal(totals_PG)[:, None], 0.0)


def policy_losses(
    logps_N: Tensor, old_logps_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """The clipped surrogate of each token, to be minimised.

    One value per token throughout. With the own log-probs, detached, as `old_logps_N` it is exactly on-policy.
    """
    ratio_N = (logps_N - old_logps_N).exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)


def k3(logps_N: Tensor, reference_logps_N: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) for each token sampled from the policy: unbiased and never negative."""
    log_x_N = reference_logps_N - logps_N
    return log_x_N.exp() - 1 - log_x_N


def weights(lengths_B: Tensor, counted_B: Tensor, loss: Loss, max_tokens: int) -> Tensor:
    """What each token of completion i weighs in the loss, so that loss = sum over i of weight_i * sum of token losses.

    "grpo": mean over completions of their means. "dapo" and "bnpo": mean over all tokens of the batch (the two differ
    only in programs whose loss depends on the micro-batch). "dr_grpo": sum over completions * `max_tokens`.
    Completions that do not count (no total) weigh 0 and are in no denominator. Lengths are tokens.
    """
    lengths_B = lengths_B.to(torch.float64).clamp(min=1)
    counted_B = counted_B.to(torch.float64)
    completions = counted_B.sum().clamp(min=1)
    if loss == "grpo":
        return counted_B / (completions * lengths_B)
    if loss == "dr_grpo":
        return counted_B / (completions * max_tokens)
    return counted_B / (counted_B * lengths_B).sum().clamp(min=1)
