"""The mathematics of GRPO over a whole batch: advantages from totals, and what each token weighs in the loss.

Pure functions on tensors, no model, no state. Totals come in as P prompts x G completions; a completion without a total
(NaN) stands outside its group. A loss is a weighted sum over tokens (`losses`) whose weights depend on the whole batch
and on nothing else, so the gradient is the same for any split into micro-batches. Formulas and papers: docs/losses.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rewardsmith.config import Advantage, Loss

EPSILON = 1e-6
SAME = 1e-9  # totals this close are the same number but for rounding


def zero_signal(totals_PG: Tensor, kind: Advantage = "group_std") -> Tensor:
    """Which groups teach nothing, as booleans: fewer than two totals, or all totals the same.

    With "reinforce_pp" the measure is the batch: a group teaches nothing when all its totals are the batch's mean.
    """
    valid_PG = ~totals_PG.isnan()
    if kind == "reinforce_pp":
        above_PG = totals_PG - _batch_mean(totals_PG)
        scale = totals_PG.nan_to_num().abs().max().clamp(min=1.0)
        return ~(valid_PG & (above_PG.abs() > SAME * scale)).any(1)
    highest_P = totals_PG.masked_fill(~valid_PG, -torch.inf).amax(1)
    lowest_P = totals_PG.masked_fill(~valid_PG, torch.inf).amin(1)
    scale_P = torch.maximum(highest_P.abs(), lowest_P.abs()).clamp(min=1.0)
    return (valid_PG.sum(1) < 2) | (highest_P - lowest_P <= SAME * scale_P)


def advantages(totals_PG: Tensor, kind: Advantage) -> Tensor:
    """How much better each completion is than expected: finite, 0 without a total and in zero-signal groups.

    "group_mean": total - mean of the group. "group_std": divided by the group's standard deviation. "batch_std":
    divided by the standard deviation of all totals of the batch. "rloo": total - mean of the group's other totals.
    "reinforce_pp": total - mean of the batch, divided by the batch's standard deviation. "reinforce_pp_baseline":
    "group_mean" divided by its standard deviation over the batch. Standard deviations are those of samples (n - 1).
    """
    valid_PG = ~totals_PG.isnan()
    known_PG = totals_PG.masked_fill(~valid_PG, 0.0)
    count_P1 = valid_PG.sum(1, keepdim=True)
    expected_P1 = known_PG.sum(1, keepdim=True) / count_P1.clamp(min=1)
    if kind == "reinforce_pp":
        expected_P1 = _batch_mean(totals_PG).expand_as(expected_P1)
    above_PG = (known_PG - expected_P1).masked_fill(~valid_PG, 0.0)
    match kind:
        case "group_mean":
            pass
        case "group_std":
            std_P1 = (above_PG.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)).sqrt()
            above_PG = above_PG / (std_P1 + EPSILON)
        case "rloo":
            above_PG = above_PG * count_P1 / (count_P1 - 1).clamp(min=1)
        case "batch_std" | "reinforce_pp":
            above_PG = above_PG / (_std(totals_PG[valid_PG]) + EPSILON)
        case "reinforce_pp_baseline":
            # Its mean over the batch is 0 already, as it is in each group.
            above_PG = above_PG / (_std(above_PG[valid_PG]) + EPSILON)
        case _:
            assert_never(kind)
    return above_PG.masked_fill(zero_signal(totals_PG, kind)[:, None], 0.0)


def _batch_mean(totals_PG: Tensor) -> Tensor:
    return totals_PG.nansum() / (~totals_PG.isnan()).sum().clamp(min=1)


def _std(values_N: Tensor) -> Tensor:
    return values_N.std() if len(values_N) > 1 else values_N.new_zeros(())


def soft_punishment(lengths_B: Tensor, truncated_B: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """What is added to a total for length (DAPO, arXiv 2503.14476): 0 up to `max_tokens - buffer` tokens, then falling
    in a line to -1 at `max_tokens`, and -1 for every completion that was cut off."""
    buffer = min(buffer, max_tokens)
    over_B = (lengths_B.to(torch.float64) - (max_tokens - buffer)).clamp(0, buffer) / buffer
    return -over_B.masked_fill(truncated_B, 1.0)


def weights(lengths_B: Tensor, counted_B: Tensor, loss: Loss, max_tokens: int) -> Tensor:
    """What each token of completion i weighs in the loss, so that loss = sum over i of weight_i * sum of token losses.

    "grpo", "gspo" and "sapo": mean over completions of their means. "dapo", "cispo" and "bnpo": mean over all tokens of
    the batch ("bnpo" differs only in programs whose loss depends on the micro-batch). "dr_grpo": sum over completions *
    `max_tokens`. Completions that do not count weigh 0 and are in no denominator. Lengths are tokens.
    """
    lengths_B = lengths_B.to(torch.float64).clamp(min=1)
    counted_B = counted_B.to(torch.float64)
    completions = counted_B.sum().clamp(min=1)
    match loss:
        case "grpo" | "gspo" | "sapo":
            return counted_B / (completions * lengths_B)
        case "dr_grpo":
            return counted_B / (completions * max_tokens)
        case "dapo" | "cispo" | "bnpo":
            return counted_B / (counted_B * lengths_B).sum().clamp(min=1)
        case _:
            assert_never(loss)
