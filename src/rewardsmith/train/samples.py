"""Completions with their scores: drawn by the engine, scored by the pool, given advantages group by group.

The lists stay in one order throughout: groups as the prompts came, completions in a group by their sample number.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch

from rewardsmith.config import GRPOConfig, SamplingParamsConfig
from rewardsmith.rewards.outcomes import Score, total
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.rollout.engine import Completion, Engine
from rewardsmith.rollout.prompts import Prompt
from rewardsmith.rollout.sampling import completion_seed
from rewardsmith.train.batch import Example
from rewardsmith.train.clock import Clock
from rewardsmith.train.grpo import advantages, soft_punishment, weights
from rewardsmith.train.losses import KL

CHECK_SECONDS = 0.1


@dataclass(frozen=True)
class Sample:
    """One completion. `number` counts the samples of its row in the step; `total` is None when it is left out."""

    prompt: Prompt
    number: int
    completion: Completion
    scores: Mapping[str, Score]
    total: float | None
    advantage: float | None = None


def draw(
    engine: Engine, prompts: Sequence[Prompt], count: int, params: SamplingParamsConfig, *seed: int | str
) -> Generator[tuple[int, list[Completion]], None, None]:
    """`count` completions of each prompt, group by group as they are finished, each with the prompt's place.

    The seed of a completion is made from `seed`, its row and its number.
    """
    numbers = _numbers(prompts, count)
    seeds = [
        completion_seed(*seed, prompt.row, number)
        for prompt, group in zip(prompts, numbers, strict=True)
        for number in group
    ]
    yield from engine.generate([prompt.ids for prompt in prompts], count, params, seeds)


class Scoring:
    """Scores groups in a thread of its own, while others are still being sampled. Use it as a context manager.

    Groups that come while some are scored are scored together, so that slow functions keep the whole pool busy.
    `check` is called while waiting and may raise to end it all: then, as after any error, no score is waited for.
    """

    def __init__(self, pool: RewardPool, check: Callable[[], None]) -> None:
        self._pool, self._check = pool, check
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self._waiting: deque[tuple[int, Group]] = deque()
        self._turns: list[Future[None]] = []
        self._scores: dict[int, list[dict[str, Score]]] = {}

    def add(self, place: int, prompt: Prompt, completions: Sequence[Completion]) -> None:
        """Raises RewardPoolError when a function with on_error="fail" has failed already."""
        for turn in self._turns:
            if turn.done():
                turn.result()
        self._waiting.append((place, as_group(prompt, completions)))
        self._turns.append(self._thread.submit(self._score_waiting))

    def scores(self) -> dict[int, list[dict[str, Score]]]:
        """By place, when all are there. Raises RewardPoolError when a function with on_error="fail" fails."""
        while True:
            done, others = wait(self._turns, timeout=CHECK_SECONDS, return_when=FIRST_EXCEPTION)
            for turn in done:
                turn.result()
            if not others:
                return self._scores
            self._check()

    def _score_waiting(self) -> None:
        taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if taken:
            scores = self._pool.score([group for _, group in taken])
            self._scores |= {place: of_group for (place, _), of_group in zip(taken, scores, strict=True)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        while error is not None and not all(turn.done() for turn in self._turns):
            self._pool.interrupt()  # again and again: one that is only about to begin would not hear it
            wait(self._turns, timeout=CHECK_SECONDS)
        self._thread.shutdown()


def as_group(prompt: Prompt, completions: Sequence[Completion]) -> Group:
    """What the pool scores."""
    return Group(prompt.text, prompt.example, [completion.text for completion in completions])


def roll_out(
    engine: Engine,
    pool: RewardPool,
    prompts: Sequence[Prompt],
    config: GRPOConfig,
    clock: Clock,
    moment: int | str,
    weights: Mapping[str, float],
    check: Callable[[], None],
    count: int | None = None,
) -> list[list[Sample]]:
    """`count` scored completions of each prompt, a whole group when not said; seeds are of the run and `moment`.

    `weights` has the weight of each reward function in the total; `check` is called while scores are waited for.

    What `clock` counts as scoring is the wait after the last completion. Raises ModelError, and RewardPoolError when a
    function with on_error="fail" fails.
    """
    count = count or config.num_generations
    drawn: list[list[Completion]] = [[] for _ in prompts]
    with (
        Scoring(pool, check) as scoring,
        closing(draw(engine, prompts, count, config.sampling_params, config.seed, moment)) as groups,
    ):
        with clock("generate"):
            for place, completions in groups:
                drawn[place] = completions
                scoring.add(place, prompts[place], completions)
        with clock("score"):
            scores = scoring.scores()
    numbers = _numbers(prompts, count)
    return [
        [
            Sample(prompt, numbers[g][i], completion, scores[g][i], total(scores[g][i], weights))
            for i, completion in enumerate(drawn[g])
        ]
        for g, prompt in enumerate(prompts)
    ]


def with_advantages(
    groups: Sequence[Sequence[Sample]],
    config: GRPOConfig,
    max_tokens: int,
    reference_logps: Sequence[torch.Tensor] | None = None,
) -> list[list[Sample]]:
    """`reference_logps` are there for a KL in the reward: one tensor per completion, group after group."""
    shaped_PG = shaped_totals(groups, config, max_tokens, reference_logps)
    values_PG = advantages(shaped_PG, config.advantage).tolist()
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


def shaped_totals(
    groups: Sequence[Sequence[Sample]],
    config: GRPOConfig,
    max_tokens: int,
    reference_logps: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Totals as advantages see them, P x G: less beta * KL with the KL in the reward, less the punishment of length.

    `Sample.total`, which is stored and shown, stays what the reward functions gave.
    """
    totals_PG = totals_of(groups)
    completions = [sample.completion for group in groups for sample in group]
    if config.kl_in == "reward":
        assert reference_logps is not None, "a KL in the reward needs the reference's log-probs"
        kl = KL[config.kl_estimate]
        kls = [
            float(kl(torch.tensor(completion.logps, dtype=torch.float64), logps.double().cpu()).sum())
            for completion, logps in zip(completions, reference_logps, strict=True)
        ]
        totals_PG = totals_PG - config.beta * torch.tensor(kls, dtype=torch.float64).view_as(totals_PG)
    if config.overlong == "punish":
        lengths_B = torch.tensor([len(completion.ids) for completion in completions])
        truncated_B = torch.tensor([completion.finish_reason == "length" for completion in completions])
        punishment_B = soft_punishment(lengths_B, truncated_B, max_tokens, config.overlong_tokens)
        totals_PG = totals_PG + punishment_B.view_as(totals_PG)
    return totals_PG


def examples(groups: Sequence[Sequence[Sample]], config: GRPOConfig, max_tokens: int) -> list[Example]:
    """What the update learns from, with each completion's weight in the loss of the whole batch."""
    samples = [sample for group in groups for sample in group]
    lengths_B = torch.tensor([len(sample.completion.ids) for sample in samples])
    counted_B = torch.tensor(
        [
            sample.total is not None
            and not (config.overlong == "filter" and sample.completion.finish_reason == "length")
            for sample in samples
        ]
    )
    weights_B = weights(lengths_B, counted_B, config.loss, max_tokens).tolist()
    return [
        Example(
            prompt=sample.prompt.ids,
            completion=sample.completion.ids,
            advantage=sample.advantage or 0.0,
            weight=weight,
            sampler_logps=sample.completion.logps,
            support=sample.completion.support,
        )
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
