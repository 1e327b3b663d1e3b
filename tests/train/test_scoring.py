"""Scoring beside sampling: a failure, or an end from outside, does not wait for slow rewards."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rewardsmith.errors import JobCanceled, RewardPoolError
from rewardsmith.reward_config import RewardFunction, RewardFunctionsConfig
from rewardsmith.rewards.pool import RewardPool
from rewardsmith.rollout.engine import Completion
from rewardsmith.rollout.prompts import Prompt
from rewardsmith.server.submission import as_revision
from rewardsmith.train.samples import Scoring

SLEEPS = "def sleeps(prompt, completion, example):\n    import time\n    time.sleep(4)\n    return 1.0\n"
FAILS = "def fails(prompt, completion, example):\n    raise ValueError('no such column')\n"
PROMPT = Prompt(0, "p", [1], {})
COMPLETIONS = [Completion([1], [-0.1], "stop", text) for text in "abcdefgh"]


@pytest.fixture
def sleepy() -> Iterator[RewardPool]:
    with pool_of("sleeps", SLEEPS) as pool:
        yield pool


def pool_of(name: str, source: str, **settings: Any) -> RewardPool:
    functions = RewardFunctionsConfig(functions={name: RewardFunction.from_source(source, **settings)})
    return RewardPool(as_revision(functions), workers=1)


def test_an_end_from_outside_does_not_wait_for_scores(sleepy: RewardPool):
    def canceled() -> None:
        raise JobCanceled("canceled")

    started = time.monotonic()
    with pytest.raises(JobCanceled), Scoring(sleepy, canceled) as scoring:
        scoring.add(0, PROMPT, COMPLETIONS)
        scoring.scores()
    assert time.monotonic() - started < 16, "eight calls of four seconds were waited for"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scoring")]


def test_an_error_of_the_sampler_does_not_wait_for_scores(sleepy: RewardPool):
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError), Scoring(sleepy, lambda: None) as scoring:
        scoring.add(0, PROMPT, COMPLETIONS)
        raise ZeroDivisionError
    assert time.monotonic() - started < 16


def test_a_failure_that_ends_the_job_is_raised_at_the_next_group():
    pool, failure = pool_of("fails", FAILS, on_error="fail"), pytest.raises(RewardPoolError, match="no such column")
    with pool, failure, Scoring(pool, lambda: None) as scoring:
        for place in range(1000):
            scoring.add(place, PROMPT, COMPLETIONS)
            time.sleep(0.02)
