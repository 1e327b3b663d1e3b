"""Held-out rows: one completion each, scored by the same reward functions, and what follows from the result.

Every evaluation draws with the same seeds, so two of them differ by the policy and not by luck of the draw. The best
checkpoint is the one with the highest held-out reward; a run that no longer gets better can stop (`exhausted`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rewardsmith.config import GRPOConfig
from rewardsmith.rewards.pool import RewardPool
from rewardsmith.rollout.engine import Engine
from rewardsmith.rollout.prompts import Prompt
from rewardsmith.train.checkpoint import Progress
from rewardsmith.train.clock import Clock
from rewardsmith.train.metrics import held_out_metrics
from rewardsmith.train.samples import Sample, roll_out

# With up to 256 rows, differences of a hundredth are noise; five saves are 100 steps by default, after which a run
# that was going to learn has begun to (contract 2.1: 40 to 50 steps).
BETTER_BY = 0.01
PATIENCE = 5


def evaluate(
    engine: Engine,
    pool: RewardPool,
    prompts: Sequence[Prompt],
    config: GRPOConfig,
    weights: Mapping[str, float],
    check: Callable[[], None],
) -> list[Sample]:
    """One scored completion of each prompt, at the run's sampling parameters. Raises RewardPoolError."""
    groups = roll_out(engine, pool, prompts, config, Clock(), "eval", weights, check, count=1)
    return [sample for group in groups for sample in group]


def note_evaluation(progress: Progress, samples: Sequence[Sample]) -> dict[str, float]:
    """Counts an evaluation towards the plateau; returns its metrics. What is best is settled when it is saved."""
    metrics = held_out_metrics(samples)
    reward = metrics.get("eval/total_reward")
    if reward is None:
        return metrics
    if progress.plateau is None or reward > progress.plateau + BETTER_BY:
        progress.plateau, progress.stale = reward, 0
    else:
        progress.stale += 1
    return metrics


def exhausted(progress: Progress) -> bool:
    return progress.stale >= PATIENCE
