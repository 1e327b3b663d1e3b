"""Weights by step: what a schedule means, and which ones are refused."""

from typing import Any

import pytest

from rewardsmith import ConfigError, GRPOConfig, RewardFunction, wire


def reward(prompt, completion, example):
    return 1.0


def function(**settings: Any) -> wire.RevisionFunction:
    return wire.RevisionFunction(name="f", source="", source_sha256="", **settings)


def test_a_weight_is_in_a_line_between_two_steps_and_level_outside():
    scheduled = function(schedule={100: 0.0, 10: 1.0, 110: 4.0})
    weights = {1: 1.0, 10: 1.0, 55: 0.5, 100: 0.0, 105: 2.0, 110: 4.0, 9999: 4.0}
    assert {step: scheduled.weight_at(step) for step in weights} == pytest.approx(weights)


def test_two_steps_side_by_side_are_a_jump_and_one_is_a_number():
    jump = function(schedule={100: 1.0, 101: -2.0})
    assert [jump.weight_at(step) for step in (1, 100, 101, 500)] == [1.0, 1.0, -2.0, -2.0]
    assert function(schedule={7: 0.5}).weight_at(1) == 0.5
    assert function(weight=3.0).weight_at(50) == 3.0


def test_scores_are_the_same_whatever_they_weigh():
    assert function(weight=2.0).scores_like(function(schedule={1: 0.1}))
    assert not function().scores_like(function(on_error="exclude"))
    assert not function().scores_like(function(none="abstain"))


def test_a_schedule_travels_with_the_config():
    config = GRPOConfig(reward_fns={"f": RewardFunction.from_callable(reward, schedule={1: 1.0, 200: 0.25})})
    sent = config.to_wire()["rewardFns"]["functions"]["f"]
    assert sent["schedule"] == {"1": 1.0, "200": 0.25} or sent["schedule"] == {1: 1.0, 200: 0.25}
    assert "weight" not in sent
    stored = GRPOConfig(**GRPOConfig(**config.to_wire()).model_dump(mode="json", by_alias=True))
    assert stored.reward_fns["f"].schedule == {1: 1.0, 200: 0.25}
    assert stored == config


@pytest.mark.parametrize("schedule", [{}, {0: 1.0}, {-1: 1.0}, {1.5: 1.0}, {1: float("nan")}, {1: "much"}, {"x": 1.0}])
def test_what_is_no_schedule_is_refused(schedule: Any):
    with pytest.raises(ConfigError, match="schedule"):
        RewardFunction.from_callable(reward, schedule=schedule)


def test_a_weight_beside_a_schedule_is_refused():
    with pytest.raises(ConfigError, match=r"weight=2 cannot act beside a schedule"):
        RewardFunction.from_callable(reward, weight=2.0, schedule={1: 1.0})
    scheduled = RewardFunction.from_callable(reward, schedule={1: 1.0})
    with pytest.raises(ConfigError, match=r"weight=2 cannot act beside a schedule"):
        scheduled.weight = 2.0
    assert scheduled.weight == 1.0
