"""Tool calls: every spelling of a call, argument by argument, and what a model might try."""

import json
from typing import Any

import pytest

from rewardsmith.rewards.library import tool_call

EXACT = {"name": "area", "arguments": {"base": 10, "unit": "cm", "deep": {"on": True, "list": [1, 2]}}}
LISTED = {"area": {"base": [10, 11], "unit": ["cm", ""], "note": ["long text, here"]}}


def scored(completion: Any, reference: Any = EXACT, **settings: Any) -> float:
    text = completion if isinstance(completion, str) else json.dumps(completion)
    return tool_call("", text, {"ground_truth": reference}, **settings)


CALL = json.dumps(EXACT)


@pytest.mark.parametrize(
    "completion",
    [
        CALL,
        f"\n{CALL}\n",
        f"```json\n{CALL}\n```",
        f"I will measure it.\n<tool_call>\n{CALL}\n</tool_call>\n",
        f"[{CALL}]",
        json.dumps({"name": "area", "parameters": EXACT["arguments"]}),
        json.dumps({"type": "function", "function": {"name": "area", "arguments": json.dumps(EXACT["arguments"])}}),
        CALL.replace("10", "10.0"),
    ],
)
def test_spellings_of_the_right_call(completion: str) -> None:
    assert scored(completion) == 1.0
    assert scored(completion, json.dumps(EXACT)) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "area(base=10)",
        f"Here it is: {CALL}",
        f"{CALL}{CALL}",
        f"[{CALL}, {CALL}]",
        f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>",
        f"<tool_call>{CALL}</tool_call> and more",
        f"<tool_call>{CALL}",
        CALL.replace("area", "areas"),
        CALL.replace("10", '"10"'),
        CALL.replace("10", "NaN"),
        CALL.replace("true", "1"),
        CALL.replace("[1, 2]", "[2, 1]"),
        CALL.replace("cm", "CM"),
        {"name": "area", "arguments": {**EXACT["arguments"], "more": 1}},
        {"name": "area", "arguments": {"base": 10}},
        {"name": "area", "arguments": []},
        {"name": "area"},
        {"arguments": EXACT["arguments"]},
        {"name": ["area"], "arguments": {}},
        "[" * 100_000,
        "null",
    ],
)
def test_other_calls(completion: Any) -> None:
    assert scored(completion) == 0.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"base": 10, "unit": "cm", "note": "long text, here"}, 1.0),
        ({"base": 11, "note": "long text, here"}, 1.0),
        ({"base": 12, "note": "long text, here"}, 0.0),
        ({"base": 10, "unit": "m", "note": "long text, here"}, 0.0),
        ({"base": 10}, 0.0),
        ({"base": [10, 11], "note": "long text, here"}, 0.0),
        ({"base": 10, "note": "Long Text here"}, 0.0),
    ],
)
def test_accepted_values(arguments: dict[str, Any], expected: float) -> None:
    assert scored({"name": "area", "arguments": arguments}, LISTED) == expected


def test_loose_texts() -> None:
    call = {"name": "area", "arguments": {"base": 10, "note": "Long-Text  here!"}}
    assert scored(call, LISTED, loose=True) == 1.0
    assert scored({"name": "AREA", "arguments": call["arguments"]}, LISTED, loose=True) == 0.0
    assert scored({"name": "area", "arguments": {"base": "10", "note": "x"}}, LISTED, loose=True) == 0.0


def test_shares_of_arguments() -> None:
    def share(**arguments: Any) -> float:
        return scored({"name": "area", "arguments": arguments}, LISTED, partial=True)

    assert share(base=10, unit="cm", note="long text, here") == 1.0
    assert share(base=10) == 1 / 2  # the note is missing; the unit may be
    assert share(base=10, unit="m", note="long text, here") == pytest.approx(2 / 3)
    assert share(base=10, note="long text, here", a=1, b=2) == 1 / 2
    assert share() == 0.0
    assert scored({"name": "other", "arguments": {"base": 10}}, LISTED, partial=True) == 0.0
    assert scored({"name": "now", "arguments": {}}, {"now": {}}, partial=True) == 1.0


def test_nested_accepted_values() -> None:
    reference = {
        "query": {"conditions": [[{"field": ["age"], "value": ["25", 25]}]], "who": [{"x": [["a", "b"]], "y": [""]}]}
    }
    good = {"conditions": [{"field": "age", "value": 25}], "who": {"x": ["a", "b"]}}
    assert scored({"name": "query", "arguments": good}, reference) == 1.0
    assert scored({"name": "query", "arguments": {**good, "who": {"x": ["b", "a"]}}}, reference) == 0.0
    assert scored({"name": "query", "arguments": {**good, "who": {"x": ["a", "b"], "z": 1}}}, reference) == 0.0
    assert scored({"name": "query", "arguments": {**good, "conditions": []}}, reference) == 0.0


def test_an_empty_text_in_an_exact_reference_must_be_given() -> None:
    reference = {"name": "f", "arguments": {"x": ""}}
    assert scored({"name": "f", "arguments": {"x": ""}}, reference) == 1.0
    assert scored({"name": "f", "arguments": {}}, reference) == 0.0


@pytest.mark.parametrize("reference", [{}, {"a": {}, "b": {}}, [EXACT, EXACT], {"f": [1]}, "[]", 7])
def test_a_row_without_one_call_is_an_error_and_no_zero(reference: Any) -> None:
    with pytest.raises(ValueError, match="column 'ground_truth' is not one call"):
        scored(CALL, reference)
