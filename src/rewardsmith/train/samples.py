"""Completions with their scores: drawn by the engine, scored by the pool, given advantages group by group.

The lists stay in one order throughout: groups as the prompts came, completions in a group by their sample number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rewardsmith.config import GRPOConfig, SamplingParamsConfig
from rewardsmith.rewards.outcomes import Score, total
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.rollout.engine import Completion, Engine
from rewardsmith.rollout.prompts import Prompt
from rewardsmith.rollout.sampling import completion_seed
from rewardsmith.train.batch import Example
from rewardsmith.train.grpo import advantages, weights


@dataclass(frozen=True)
class Sample:
    """One completion. `number` counts the samples of its row in the step; `total` is None when it is left out."""

    prompt: Prompt
    number: int
    completion: Completion
    scores: Mapping[str, Score]
    total: float | None
    advantage: float | None = None


def generate(
    engine: Engine, prompts: Sequence[Prompt], count: int, params: SamplingParamsConfig, *seed: int | str
) -> list[list[Completion]]:
    """`count` completions of each prompt; each one's seed is made from `seed`, its row and its number."""
    numbers = _numbers(prompts, count)
    seeds = [
        completion_seed(*seed, prompt.row, number)
        for prompt, group in zip(prompts, numbers, strict=True)
        for number in group
    ]
    return engine.generate([prompt.ids for prompt in prompts], count, params, seeds)


def score(pool: RewardPool, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> list[list[Sample]]:
    """Raises RewardPoolError when a function with on_error="fail" fails."""
    asked = [
        Group(prompt.text, prompt.example, [completion.text for completion in group])
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    scores = pool.score(asked)
    function_weights = {function.name: function.weight for function in pool.functions}
    numbers = _numbers(prompts, len(groups[0]) if groups else 0)
    return [
        [
            Sample(prompt, numbers[g][i], completion, scores[g][i], total(scores[g][i], function_weights))
            for i, completion in enumerate(groups[g])
        ]
        for g, prompt in enumerate(prompts)
    ]


def with_advantages(groups: Sequence[Sequence[Sample]], config: GRPOConfig) -> list[list[Sample]]:
    values_PG = advantages(totals_of(groups), config.advantage).tolist()
    return [
        [replace(sample, advantage=value) for sample, value in zip(group, values, strict=True)]
        for group, values in zip(groups, values_PG, strict=True)
    ]


def totals_of(groups: Sequence[Sequence[Sample]]) -> torch.Tensor:
    """Totals as P x G float64, NaN where there is none."""
    return torch.tensor(
        [[math.nan if sample.total is None else sample.total for sample in group] for group in groups],
        dtype=torch.float64,
    )


def examples(groups: Sequence[Sequence[Sample]], config: GRPOConfig, max_tokens: int) -> list[Example]:
    """What the update learns from, with each completion's weight in the loss of the whole batch."""
    samples = [sample for group in groups for sample in group]
    lengths_B = torch.tensor([len(sample.completion.ids) for sample in samples])
    counted_B = torch.tensor([sample.total is not None for sample in samples])
    weights_B = weights(lengths_B, counted_B, config.loss, max_tokens).tolist()
    return [
        Example(sample.prompt.ids, sample.completion.ids, sample.advantage or 0.0, weight)
        for sample, weight in zip(samples, weights_B, strict=True)
    ]


def _numbers(prompts: Sequence[Prompt], count: int) -> list[list[int]]:
    """Sample numbers by group; a row that comes twice in a step goes on counting, so that its answers differ."""
    seen: Counter[int] = Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(list(range(seen[prompt.row], seen[prompt.row] + count)))
        seen[prompt.row] += count
    return numbers
