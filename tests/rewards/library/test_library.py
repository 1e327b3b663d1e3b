"""Every reward of the library: it travels as text, says what it must say, and takes settings."""

import ast
import asyncio
import inspect
from typing import Any

import pytest

from rewardsmith import ConfigError, RewardFunction, RewardFunctionsConfig, RewardSourceError
from rewardsmith.rewards import library, modes, source
from rewardsmith.rewards.library import exact_match, numeric_match, with_settings

REWARDS = {name: getattr(library, name) for name in library.__all__ if name != "with_settings"}


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
def test_it_travels_as_text(reward: Any) -> None:
    text = RewardFunction.from_callable(reward).source
    assert source.check(text) == []
    assert source.compile_function(text, "<library>").__name__ == reward.__name__


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
def test_it_may_share_a_process_with_other_calls(reward: Any) -> None:
    assert modes.runs_text(source.source_of(reward)) is None


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
def test_it_says_its_range_its_columns_and_how_it_is_gamed(reward: Any) -> None:
    said = inspect.getdoc(reward) or ""
    places = [said.index(f"\n{word}: ") for word in ("Range", "Reads", "Settings", "Gamed by")]
    assert places == sorted(places)
    settings = [name for name, each in inspect.signature(reward).parameters.items() if each.kind is each.KEYWORD_ONLY]
    assert settings
    for name in settings:
        assert f"`{name}" in said, f"the setting {name} is not explained"


def test_it_needs_the_standard_library_and_the_worker_alone() -> None:
    import sys

    for reward in REWARDS.values():
        for node in ast.walk(ast.parse(source.source_of(reward))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "reward_tools"}


def test_a_set_of_them_is_a_config() -> None:
    config = RewardFunctionsConfig(
        functions={"right": with_settings(numeric_match, anywhere=True, weight=0.9), "exact": exact_match}
    )
    assert config["right"].weight == 0.9
    assert config["right"].function("", "so it is 7", {"answer": 7}) == 1.0
    assert config["exact"].function("", "so it is 7", {"answer": 7}) == 0.0


# ---- settings -------------------------------------------------------------------------------------------------------


def near(prompt, completion, example, *, column="länge", margin=2, words=("a", "b"), note=None):
    """Within a margin of the column's length."""
    return float(abs(len(completion) - example[column]) <= margin), words, note


async def later(prompt, completion, example, *, seconds=5):
    return seconds


def test_settings_become_the_defaults_in_the_text() -> None:
    made = with_settings(near, margin=0, words=["ü", 'quote"d', "two\nlines"], weight=2.0, on_error="exclude")
    assert made.function("", "abc", {"länge": 3}) == (1.0, ["ü", 'quote"d', "two\nlines"], None)
    assert made.function("", "abc", {"länge": 4})[0] == 0.0
    assert (made.weight, made.on_error) == (2.0, "exclude")
    assert '"""Within a margin of the column\'s length."""' in made.source
    assert 'column="länge"' in made.source


def test_settings_of_several_kinds_and_places() -> None:
    made = with_settings(near, column="n", note={"deep": [1, 2.5, None, True]})
    assert made.function("", "ab", {"n": 4}) == (1.0, ("a", "b"), {"deep": [1, 2.5, None, True]})


def test_without_settings_nothing_changes() -> None:
    assert with_settings(near).source == source.source_of(near)


def test_an_unknown_setting_is_named_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"'near' has no setting 'margins'; its settings: column, margin, words, note"
    ):
        with_settings(near, margins=1)
    with pytest.raises(ConfigError, match="no setting 'encoded_fn'"):
        with_settings(near, encoded_fn="x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), len, REWARDS["exact_match"], [object()]])
def test_a_value_that_cannot_be_written_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"setting 'margin' of 'near' is a .* that cannot be written as text"):
        with_settings(near, margin=value)


def test_what_cannot_travel_is_refused_here_too() -> None:
    with pytest.raises(RewardSourceError, match="comes from outside the function"):

        def leaning(prompt, completion, example, *, n=1):
            return REWARDS, n

        with_settings(leaning, n=2)


def test_settings_of_an_async_function() -> None:
    assert asyncio.run(with_settings(later, seconds=9).function("", "", {})) == 9
