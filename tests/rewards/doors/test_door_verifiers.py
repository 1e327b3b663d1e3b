"""verifiers' functions: arguments by name, groups by plural names, metrics of weight 0, and what is refused."""

from typing import Any

import foreign_rewards as foreign
import pytest

from rewardsmith import ConfigError
from rewardsmith.rewards import source
from rewardsmith.rewards.doors import from_verifiers


def scored(reward: Any, completion: str, **row: Any) -> Any:
    assert source.check(reward.source) == []
    return reward.function("prompt", completion, {"prompt": "of the row", **row})


def test_messages_on_request() -> None:
    reward = from_verifiers(foreign.correct_answer, chat=True)
    assert scored(reward, " 4 ", answer="4") == 1.0
    assert scored(reward, "5", answer="4") == 0.0
    assert scored(reward, "5") == 0.0


def test_arguments_by_name_and_columns() -> None:
    reward = from_verifiers(foreign.with_info)
    row = {"difficulty": 2.0, "task": "sums"}
    assert scored(reward, "x", info={"points": 3}, **row) == 6 + 6 + 100 + 1000
    assert scored(reward, "x", info='{"points": 3}', hint="think", **row) == 6 + 6 + 100
    with pytest.raises(KeyError, match="difficulty"):
        scored(reward, "x", info={"points": 3})


def test_keyword_arguments_get_everything_and_a_metric_weighs_nothing() -> None:
    reward = from_verifiers(foreign.length_of, weight=0.0)
    assert reward.weight == 0.0
    assert scored(reward, "abc", more=1) == 3 + len({"prompt", "answer", "info", "task", "more"})


def test_groups() -> None:
    for function in (foreign.diversity, foreign.above_the_mean, foreign.annotated_as_a_list):
        reward = from_verifiers(function)
        assert reward.source.startswith("def reward(prompt, completions, example):")
        assert source.check(reward.source, "group") == []
        assert reward.per == "group"
    texts = ["a", "b", "a"]
    assert from_verifiers(foreign.diversity).function("p", texts, {}) == [0.5, 1.0, 0.5]
    assert from_verifiers(foreign.above_the_mean).function("p", texts, {"answer": "b"}) == pytest.approx(
        [-1 / 3, 2 / 3, -1 / 3]
    )
    assert from_verifiers(foreign.annotated_as_a_list).function("pq", texts, {}) == [2.0] * 3
    assert from_verifiers(foreign.of_a_group_by_its_result).function("p", ["a", "bc"], {}) == [1.0, 2.0]


def test_a_group_of_messages() -> None:
    def last_words(prompts, completions):
        return [
            completion[-1]["content"] + prompt[0]["content"]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    assert from_verifiers(last_words, chat=True).function("p", ["a", "b"], {}) == ["ap", "bp"]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (foreign.judged, "`judged` asks for 'state': there is one turn"),
        (foreign.remembered, "`remembered` asks for 'state'"),
        (foreign.parsed_by, "`parsed_by` asks for 'parser': an object cannot travel"),
        (foreign.correct_answer, "`correct_answer` reads the 'content' of something: say chat=True"),
    ],
)
def test_what_cannot_be_carried_over_is_named(function: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_verifiers(function)


def test_a_group_has_no_columns() -> None:
    def scaled(completions, scale) -> list[float]:
        return [scale for _ in completions]

    with pytest.raises(
        ConfigError, match="`scaled` asks for 'scale', but a function of a group gets prompts, completions"
    ):
        from_verifiers(scaled)
