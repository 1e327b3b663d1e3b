"""TRL's batch functions: lists of one or of a group, columns by name, None as no opinion, and what is refused."""

import asyncio
import math
from typing import Any

import foreign_rewards as foreign
import pytest

from rewardsmith import ConfigError, RewardFunction
from rewardsmith.rewards import source
from rewardsmith.rewards.doors import from_trl


def scored(reward: RewardFunction, completion: str, /, **row: Any) -> Any:
    assert source.check(reward.source) == []
    return reward.function("the prompt", completion, {"prompt": "the prompt", **row})


def test_conversations() -> None:
    reward = from_trl(foreign.strict_format, chat=True)
    assert scored(reward, "<think>a</think>\n<answer>b</answer>") == 1.0
    assert scored(reward, " <think>a</think>\n<answer>b</answer>") == 0.0


def test_partial_shares() -> None:
    reward = from_trl(foreign.tag_shares)
    assert [scored(reward, text) for text in ("<answer></answer>", "<think></think>", "")] == [0.75, 0.25, 0.0]


def test_none_is_no_opinion() -> None:
    reward = from_trl(foreign.accuracy)
    assert reward.none == "abstain"
    assert scored(reward, "it is 1,234", solution="1234") == 1.0
    assert scored(reward, "it is 12", solution="1234") == 0.0
    assert scored(reward, "it is 12", solution="unknown") is None
    assert from_trl(foreign.accuracy, none="error", weight=2.0).weight == 2.0


def test_columns_by_name_keep_their_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    reward = from_trl(foreign.with_columns)
    assert scored(reward, "(1 + 2) * 3", nums=[3, 2, 1], target=9) == 1.0
    assert scored(reward, "1 + 2 * 3", nums="[1, 2, 3]", target=9.0, bonus=0.5) == 0.5
    assert scored(reward, "1 + 2", nums=[1, 2, 3], target=3, extra="not asked for") == 0.0
    assert "used: 11\nmean: 1.0\n" in capsys.readouterr().out
    with pytest.raises(KeyError, match="target"):
        scored(reward, "1", nums=[1])


def test_everything_for_keyword_arguments() -> None:
    def given(completions, prompts, **kwargs):
        return [(prompts, completions, sorted(kwargs), kwargs["b"])]

    got = scored(from_trl(given), "c", a=1, b=[2], completion="of the row")
    assert got == (["the prompt"], ["c"], ["a", "b", "log_extra", "log_metric"], [[2]])


def test_async() -> None:
    reward = from_trl(foreign.later)
    assert reward.source.startswith("async def reward(prompt, completion, example):")
    assert asyncio.run(scored(reward, "abc")) == 3.0


def test_a_factory_s_arguments_come_along() -> None:
    reward = from_trl(foreign.cosine(10.0))
    assert scored(reward, "yes", solution="yes") == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 10)))
    assert scored(reward, "no " * 10, solution="yes") == pytest.approx(-0.5)


def test_once_for_a_group() -> None:
    reward = from_trl(foreign.ranked, per="group")
    assert reward.source.startswith("def reward(prompt, completions, example):")
    assert reward.function("p", ["aa", "a", "aaa"], {}) == [0.5, 0.0, 1.0]
    assert from_trl(foreign.accuracy, per="group").function("p", ["1", "2"], {"solution": "2"}) == [0.0, 1.0]


def test_random_baseline() -> None:
    reward = from_trl(foreign.random_baseline)
    assert {scored(reward, "x") for _ in range(100)} == {0.0, 1.0}


def test_a_wrong_number_of_scores_raises() -> None:
    with pytest.raises(ValueError, match="`wrong_length` gave 3 scores for 1 completions"):
        scored(from_trl(foreign.wrong_length), "x")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (foreign.by_progress, "`by_progress` asks for 'trainer_state': .*schedule"),
        (foreign.by_progress_inside, "`by_progress_inside` asks for 'trainer_state'"),
        (foreign.by_tokens, "`by_tokens` asks for 'completion_ids': .*the text, not the tokens"),
        (foreign.in_order, r"`in_order` takes `\*more` by position"),
        (foreign.strict_format, "`strict_format` reads the 'content' of something: say chat=True"),
    ],
)
def test_what_cannot_be_carried_over_is_named(function: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_trl(function)
