"""What goes along with a function, and what is refused: by name, with the line and the fix."""

import ast
from typing import TYPE_CHECKING, Any

import foreign_rewards as foreign
import pytest
import shadowing_rewards as shadowing

from rewardsmith import RewardSourceError
from rewardsmith.rewards.doors.carry import carry, reward_text

if TYPE_CHECKING:
    from decimal import Decimal as Unknown


def carried(function: Any) -> Any:
    """The function made again from what was carried, in an empty namespace, two functions deep."""
    text = reward_text("x", [carry(function), f"return {function.__name__}\n"])
    namespace: dict[str, Any] = {"__name__": "elsewhere"}
    exec(compile(text, "<carried>", "exec"), namespace)
    return namespace["reward"]("p", "c", {})


TEXTS = ["<think>a</think> <answer>4</answer>", "<THINK>a</THINK><answer>b</answer>", "", "1,234", "<a/>", "abc"]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (foreign.tag_shares, {"completions": TEXTS}),
        (foreign.accuracy, {"completions": TEXTS, "solution": ["1234"] * 5 + ["none"]}),
        (foreign.ranked, {"completions": TEXTS}),
        (foreign.cosine(10.0), {"completions": ["a b c", "b"], "solution": ["a", "a"]}),
        (
            foreign.boxed_score,
            {"data_source": "d", "solution_str": r"so \boxed{\frac12 \text{ cm}}", "ground_truth": r"\frac{1}{2}cm"},
        ),
        (foreign.gsm8k_score, {"solution_str": "#### 1,000", "ground_truth": "1000"}),
        (foreign.submodules, {"completions": ["<a/>", "<b/>"]}),
        (foreign.with_a_class, {"completions": ["x"]}),
        (foreign.mutual, {"completions": ["a", "ab"]}),
        (foreign.aliased, {"completions": ["7"]}),
        (shadowing.shadowed, {"completions": ["x"]}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_does_there_what_it_does_here(function: Any, arguments: dict[str, Any]) -> None:
    assert carried(function)(**arguments) == function(**arguments)


def test_only_what_is_needed_goes_along() -> None:
    text = carry(foreign.accuracy)
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert "lru_cache" in names
    assert not names & {"np", "SESSION", "TAG_SHARES", "STRICT", "Any", "Maybe"}
    assert "import numpy" not in text
    assert text.index("CLIP = 300") < text.index("def parsed") < text.index("def accuracy")


def test_annotations_stay_behind_and_docstrings_come_along() -> None:
    text = carry(foreign.strict_format)
    assert 'def strict_format(completions, **kwargs):\n    """1 for the strict form; conversations."""' in text


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (foreign.counting, "`counting` changes the global `calls`"),
        (foreign.with_session, "line 2 of `with_session`: `SESSION` is a object that cannot be written as text"),
        (foreign.missing_helper, "line 2 of `missing_helper`: `normalise` is not defined"),
        (foreign.where_am_i, "line 2 of `where_am_i`: the name `__file__` is taken"),
        (foreign.cosine(1.0, unit=object()), "line 2 of `with_unit`: `unit` is a object that cannot be written"),
        (foreign.Rewards().method, "'method' is a method and needs its object"),
        (foreign.Rewards(), "is of type Rewards, not a plain function"),
        (foreign.Rewards, "is a class"),
        (foreign.doubled, "'doubled' is wrapped by a decorator"),
        (foreign.with_mark, "the decorator `@marked` of `with_mark` does not travel"),
        (foreign.fixed, "functools.partial has no text"),
        (lambda completions: [1.0], "a lambda has no text"),
        (shadowing.two_meanings, "`parsed` has two meanings"),
        (shadowing.imports_a_file, "`imports_a_file` imports `foreign_rewards`, a file of yours"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_come_along_is_named(function: Any, says: str) -> None:
    with pytest.raises(RewardSourceError) as caught:
        carry(function)
    assert says in str(caught.value)


def test_all_problems_are_said_at_once() -> None:
    def several(completions, **kwargs):
        return foreign.ranked(completions), unknown, SESSION  # noqa: F821

    with pytest.raises(RewardSourceError) as caught:
        carry(several)
    assert len(str(caught.value).splitlines()) == 3
    assert "the module `foreign_rewards` is a file of yours; import what is needed from it by name" in str(caught.value)


def test_nonlocal_state_is_refused() -> None:
    seen = 0

    def counting(completions, **kwargs):
        nonlocal seen
        seen += 1
        return [seen]

    with pytest.raises(RewardSourceError, match="changes a variable of the function around it"):
        carry(counting)


def test_names_of_the_function_around_are_kept_free() -> None:
    def example(completions, **kwargs):
        return [1.0]

    with pytest.raises(RewardSourceError, match="the name `example` is taken in a reward function; rename yours"):
        carry(example)


def test_one_line_functions_comments_and_strings_keep_their_shape() -> None:
    def short(a, b: "Unknown" = 2, /, *c: "Unknown", d: "Unknown" = (1,), **e): return a, b, c, d, e  # fmt: skip

    def long(
        a: "Unknown",
        b=("x", "y"),
    ) -> "Unknown":
        # first
        text = """one
two
    three"""
        return a, b, text

    assert carried(short)(1, 5, 6, d=7, f=8) == (1, 5, (6,), 7, {"f": 8})
    assert carried(long)(1) == (1, ("x", "y"), "one\ntwo\n    three")
