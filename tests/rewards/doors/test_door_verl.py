"""verl's compute_score: references nested or flat, options, dict results, and what is refused."""

import asyncio
import json
from pathlib import Path
from typing import Any

import foreign_rewards as foreign
import pytest

from rewardsmith import ConfigError
from rewardsmith.rewards import source
from rewardsmith.rewards.doors import from_verl

DATA = Path(__file__).parents[4] / "shared" / "data"


def scored(reward: Any, completion: str, **row: Any) -> Any:
    assert source.check(reward.source) == []
    return reward.function("the prompt", completion, row)


def test_references_nested_flat_and_as_json_text() -> None:
    reward = from_verl(foreign.gsm8k_score)
    assert scored(reward, "#### 1,000", reward_model={"ground_truth": "1000", "style": "rule"}) == 1.0
    assert scored(reward, "#### 1,000", reward_model='{"ground_truth": "1000"}') == 1.0
    assert scored(reward, "#### 1,000", ground_truth="1000") == 1.0
    assert scored(from_verl(foreign.gsm8k_score, column="answer"), "#### 1,000", answer="1000") == 1.0
    with pytest.raises(ValueError, match="neither reward_model nor the column ground_truth"):
        scored(reward, "#### 1", answer="1")


def test_options_from_the_config() -> None:
    reward = from_verl(foreign.gsm8k_score, reward_kwargs={"method": "flexible", "format_score": 0.1})
    assert scored(reward, "so 12", ground_truth="12") == 1.0
    assert scored(reward, "so 13", ground_truth="12") == 0.1
    assert scored(reward, "none", ground_truth="12") == 0
    assert scored(from_verl(foreign.gsm8k_score), "so 12", ground_truth="12") == 0


def test_only_the_end_is_read() -> None:
    reward = from_verl(foreign.gsm8k_score)
    assert scored(reward, "#### 12" + "." * 300, ground_truth="12") == 0


def test_a_dict_gives_its_score_and_prints_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    reward = from_verl(foreign.boxed_score)
    row = {"data_source": "math", "reward_model": {"ground_truth": r"\frac{1}{2}"}, "extra_info": {"index": 3}}
    assert scored(reward, r"so \boxed{\frac12}", **row) == 1.0
    assert json.loads(capsys.readouterr().out) == {"acc": True, "pred": r"\frac12", "source": "math"}
    assert scored(reward, r"\boxed{\text{a {nested} one}} then \boxed{3", **row) == -1.0
    assert json.loads(capsys.readouterr().out)["pred"] is None


def test_references_that_are_lists_and_dicts() -> None:
    reward = from_verl(foreign.em_score)
    row = {"reward_model": {"ground_truth": {"target": ["The Beatles", "Beatles"]}}}
    assert scored(reward, "<answer>beatles!</answer>", **row) == 1.0
    assert scored(reward, "<answer>x</answer><answer>the beatles</answer>", **row) == 0.25
    assert scored(reward, "beatles", **row) == 0


def test_a_continuous_score() -> None:
    assert scored(from_verl(foreign.f1_score), "a b c", ground_truth="B c d") == pytest.approx(2 / 3)


def test_nested_extra_info_also_as_json_text() -> None:
    reward = from_verl(foreign.choice_score)
    info = {"choices": ["red", "green"]}
    for given in (info, json.dumps(info)):
        assert scored(reward, "B", ground_truth="green", extra_info=given) == 1.0
        assert scored(reward, "A", ground_truth="green", extra_info=given) == 0.0
    checks = {"ids": ["no_commas", "most_words", "ends_with"], "arguments": [{}, {"most": 2}, {"ending": "!"}]}
    assert scored(
        from_verl(foreign.constraints_score), "yes, it is!", ground_truth="", extra_info=checks
    ) == pytest.approx(1 / 3)


def test_async_and_a_final_failure() -> None:
    reward = from_verl(foreign.remote_score, reward_kwargs={"url": "good"})
    assert reward.source.startswith("async def reward(prompt, completion, example):")
    assert asyncio.run(scored(reward, "x", ground_truth="y")) == 0.5
    with pytest.raises(ConnectionError, match="no answer of bad"):
        asyncio.run(scored(from_verl(foreign.remote_score, reward_kwargs={"url": "bad"}), "x", ground_truth="y"))


def test_the_batch_manager_s_form(capsys: pytest.CaptureFixture[str]) -> None:
    reward = from_verl(foreign.batch_score, reward_kwargs={"scale": 2}, weight=0.5)
    assert scored(reward, "abc", ground_truth="abc") == 1.0
    assert json.loads(capsys.readouterr().out) == {"length": 3, "scale": 2}
    assert reward.weight == 0.5


def test_gsm8k_rows() -> None:
    file = DATA / "gsm8k/test.jsonl"
    if not file.exists():
        pytest.skip("needs ../shared/data/gsm8k")
    reward = from_verl(foreign.gsm8k_score, column="answer").function
    for line in file.read_text().splitlines():
        row = json.loads(line)
        assert reward(row["prompt"], row["solution"], row) == 1.0


def test_what_cannot_be_given_is_named() -> None:
    with pytest.raises(
        ConfigError, match="`remote_score` asks for 'url', which verl does not give; say reward_kwargs="
    ):
        from_verl(foreign.remote_score)
    with pytest.raises(ConfigError, match="`gsm8k_score` cannot take 'mode' from reward_kwargs"):
        from_verl(foreign.gsm8k_score, reward_kwargs={"mode": "strict"})
    with pytest.raises(ConfigError, match="cannot take 'ground_truth'"):
        from_verl(foreign.gsm8k_score, reward_kwargs={"ground_truth": "1"})
    with pytest.raises(ConfigError, match=r"reward_kwargs\['method'\] is a object that cannot be written"):
        from_verl(foreign.gsm8k_score, reward_kwargs={"method": object()})
