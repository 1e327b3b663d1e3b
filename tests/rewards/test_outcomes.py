"""The weighted total and the guard on error rates."""

import pytest

from rewardsmith.rewards.outcomes import ErrorGuard, Score, total

GOOD = Score("ok", 1.0, 0.0)
BAD = Score("exception", 0.0, 0.0, error="Traceback ...\nKeyError: 'answer'")


def value(number: float | None) -> Score:
    return Score("ok" if number is not None else "abstain", number, 0.0)


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 2.0}, 2.0),
        ({"a": 1.0, "b": -1.0}, {"a": 1.0, "b": -1.0}, 2.0),
        ({"a": 1.0, "b": None}, {"a": 1.0, "b": 1.0}, None),
        ({"a": 1.0, "b": None}, {"a": 1.0, "b": 0.0}, 1.0),
        ({"a": 1e308, "b": 1e308}, {"a": 1.0, "b": 1.0}, None),
        ({"a": 1e308}, {"a": 1e308}, None),
        ({"a": 1e308, "b": 1e308}, {"a": 1e308, "b": -1e308}, None),
        ({"a": 1e12}, {"a": -1.0}, -1e12),
        ({"a": 1e12, "b": 1e12}, {"a": 1.0, "b": 1.0}, None),
        ({"a": 1.0}, {"a": 1.1e12}, None),
        ({}, {}, 0.0),
    ],
)
def test_total(values: dict[str, float | None], weights: dict[str, float], expected: float | None) -> None:
    assert total({name: value(number) for name, number in values.items()}, weights) == expected


@pytest.mark.parametrize("outcome", ["ok", "abstain"])
def test_an_opinion_or_none_is_no_failure(outcome: str) -> None:
    assert not Score(outcome, None, 0.0).failed  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "outcome",
    ["not_a_number", "exception", "timeout", "crash", "out_of_memory", "output_limit", "infrastructure"],
)
def test_everything_else_is_a_failure(outcome: str) -> None:
    assert Score(outcome, 0.0, 0.0).failed  # type: ignore[arg-type]


def step(good: int, bad: int, name: str = "f") -> list[dict[str, Score]]:
    return [{name: GOOD}] * good + [{name: BAD}] * bad


def test_guard_allows_a_fifth_of_the_first_200_calls_and_no_more() -> None:
    guard = ErrorGuard()
    assert guard.observe(step(160, 40)) is None
    assert guard.observe(step(60, 40)) is None
    guard = ErrorGuard()
    assert guard.observe(step(79, 20)) is None
    reason = guard.observe(step(80, 21))
    assert reason == "reward function 'f' failed in 41 of its first 200 calls, last by exception: KeyError: 'answer'"


def test_guard_speaks_as_soon_as_it_is_certain() -> None:
    guard = ErrorGuard()
    assert guard.observe(step(60, 20)) is None
    assert "41 of its first 101 calls" in (guard.observe(step(0, 21)) or "")


def test_guard_stops_at_two_bad_steps_running_even_late() -> None:
    guard = ErrorGuard()
    assert guard.observe(step(400, 0)) is None
    assert guard.observe(step(4, 6)) is None
    assert guard.observe(step(5, 5)) is None
    assert guard.observe(step(4, 6)) is None
    assert "more than half of its calls in 2 steps running" in (guard.observe(step(4, 6)) or "")


def test_guard_judges_each_function_by_itself() -> None:
    guard = ErrorGuard()
    mixed = [{"good": GOOD, "bad": BAD}] * 50
    reason = guard.observe(mixed) or ""
    assert "'bad'" in reason
    assert "'good'" not in reason
