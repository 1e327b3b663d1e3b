"""OpenAI's grader JSON: every type, templates, the formula, and what is refused by name."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from judge_server import Judge

from rewardsmith import ConfigError, RewardSourceError
from rewardsmith.rewards import source
from rewardsmith.rewards.doors import from_openai_grader
from rewardsmith.rewards.doors import openai_scores as scores

ANSWER = {"type": "string_check", "name": "a", "input": "{{sample.output_text}}", "reference": "{{ item.answer }}"}


def scored(grader: Any, completion: str, **row: Any) -> Any:
    reward = from_openai_grader(grader)
    assert source.check(reward.source) == []
    return reward.function("the prompt", completion, row)


# ---- string_check and templates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "completion", "expected"),
    [
        ("eq", "Paris", 1.0),
        ("eq", "paris", 0.0),
        ("ne", "Paris", 0.0),
        ("ne", "", 1.0),
        ("like", "It is Paris.", 1.0),
        ("like", "It is paris.", 0.0),
        ("ilike", "It is PARIS.", 1.0),
        ("ilike", "Lyon", 0.0),
    ],
)
def test_string_check(operation: str, completion: str, expected: float) -> None:
    assert scored({**ANSWER, "operation": operation}, completion, answer="Paris") == expected
    assert scored(json.dumps({**ANSWER, "operation": operation}), completion, answer="Paris") == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{item.answer}}", "4"),
        ("{{ item.nested.list[1].x }}{{item.nested.list.0}}", "deepfirst"),
        ("{{item['odd name']}}", "odd"),
        ("= {{ item.flag }}, {{ item.none }}, {{item.list}} =", '= true, null, [1, "ü"] ='),
        ("{{ sample.output_json.a.b }} and {{ sample.output_json.c[0] }}", "1.5 and two"),
        ("{{sample.output_text}}", '{"a": {"b": 1.5}, "c": ["two"]}'),
        ("no { braces } {{", "no { braces } {{"),
    ],
)
def test_templates(template: str, expected: str) -> None:
    row = {
        "answer": 4,
        "nested": {"list": ["first", {"x": "deep"}]},
        "odd name": "odd",
        "flag": True,
        "none": None,
        "list": [1, "ü"],
        "expected": expected,
    }
    grader = {**ANSWER, "operation": "eq", "input": template, "reference": "{{item.expected}}"}
    assert scored(grader, '{"a": {"b": 1.5}, "c": ["two"]}', **row) == 1.0


@pytest.mark.parametrize("completion", ["not json", "{}", '{"a": null}', '{"a": []}', "[1]", "3", "[" * 100_000])
def test_json_that_is_not_there_scores_nothing_whatever_the_operation(completion: str) -> None:
    for operation in ("eq", "ne", "like", "ilike"):
        grader = {**ANSWER, "operation": operation, "input": "{{sample.output_json.a.b}}", "reference": ""}
        assert scored(grader, completion) == 0.0


def test_a_column_that_is_not_there_is_an_error_and_no_zero() -> None:
    with pytest.raises(KeyError, match=r"the row has no answer"):
        scored({**ANSWER, "operation": "eq"}, "x")


def test_a_template_fills_nothing_in_twice() -> None:
    assert scored({**ANSWER, "operation": "eq"}, "{{item.answer}}", answer="secret") == 0.0


# ---- text_similarity ------------------------------------------------------------------------------------------------

CAT, MAT = "The cat sat on the mat", "The cat is on the mat."


@pytest.mark.parametrize(
    ("metric", "text", "reference", "expected"),
    [
        ("fuzzy_match", "kitten", "sitting", 2 * 4 / 13),
        ("fuzzy_match", "", "", 1.0),
        ("fuzzy_match", "ab", "", 0.0),
        ("rouge_1", CAT, MAT, 2 * 5 / 12),
        ("rouge_2", CAT, MAT, 2 * 3 / 10),
        ("rouge_3", CAT, MAT, 2 * 1 / 8),
        ("rouge_4", CAT, MAT, 0.0),
        ("rouge_5", "a b c d e", "A, b c d e!", 1.0),
        ("rouge_l", CAT, MAT, 2 * 5 / 12),
        ("rouge_l", "a b", "b a", 0.5),
        ("bleu", "the the the the", "the cat", 0.0),
        ("bleu", "a b c d e", "a b c d f", (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        ("bleu", "a b c d", "a b c d e f", 2.718281828459045 ** (1 - 6 / 4)),
        ("bleu", "yes", "yes", 1.0),
        ("bleu", "", "yes", 0.0),
        ("gleu", "a b c d", "a b c x", (3 + 2 + 1) / 10),
        ("gleu", "a b", "a b c d", 3 / 10),
        ("gleu", "a b a b", "a b", 3 / 10),
        ("gleu", "", "", 1.0),
    ],
)
def test_similarity(metric: str, text: str, reference: str, expected: float) -> None:
    grader = {
        "type": "text_similarity",
        "input": "{{sample.output_text}}",
        "reference": "{{item.r}}",
        "evaluation_metric": metric,
    }
    assert scored(grader, text, r=reference) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "gleu", *(f"rouge_{n}" for n in (1, 2, 3, 4, 5, "l"))])
def test_the_reference_itself_is_most_similar(metric: str) -> None:
    grader = {
        "type": "text_similarity",
        "input": "{{sample.output_text}}",
        "reference": "{{item.r}}",
        "evaluation_metric": metric,
    }
    assert scored(grader, MAT, r=MAT) == pytest.approx(1.0)
    for other in ("", "The cat", MAT + " Or not.", MAT[::-1]):
        assert 0 <= scored(grader, other, r=MAT) < 1


def test_the_longest_common_subsequence_is_that_of_the_textbook() -> None:
    import random

    def slow(one: str, other: str) -> int:
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    rng = random.Random(0)
    for _ in range(200):
        one, other = ("".join(rng.choices("abc", k=rng.randrange(12))) for _ in range(2))
        assert scores.common(one, other) == slow(one, other)


# ---- python ---------------------------------------------------------------------------------------------------------

PYTHON = '''from __future__ import annotations

import re
from typing import Any

LIMIT = 3
NOTE = """kept
as it is"""

def words(text: str) -> list[str]:
    return re.findall(r"\\w+", text)

class Scale:
    top = LIMIT

def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    assert NOTE == "kept\\nas it is"
    found = words(sample["output_text"])
    if sample["output_json"] is not None:
        return sample["output_json"]["score"]
    return min(len(found), Scale.top) / LIMIT + (item["answer"] in found)
'''


def test_python() -> None:
    grader = {"type": "python", "name": "p", "source": PYTHON, "image_tag": "2025-05-08"}
    assert scored(grader, "one two", answer="two") == pytest.approx(2 / 3 + 1)
    assert scored(grader, "one two three four", answer="five") == 1.0
    assert scored(grader, '{"score": 0.25}', answer="") == 0.25


def test_python_that_raises_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        scored({"type": "python", "source": "def grade(sample, item):\n    return 1 / 0"}, "x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def grade(sample, item)\n    return 1", "cannot be read"),
        ("def score(sample, item): return 1", "has no `def grade"),
        ("def grade(sample): return 1", "has no `def grade"),
        ("n = 0\ndef grade(sample, item):\n    global n\n    n += 1\n    return n", "changes the global 'n'"),
        (None, "cannot be read"),
    ],
)
def test_python_that_cannot_be_carried_over(text: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_openai_grader({"type": "python", "source": text})


def test_python_with_a_name_from_nowhere() -> None:
    with pytest.raises(RewardSourceError, match="`np` is not defined"):
        from_openai_grader({"type": "python", "source": "def grade(sample, item):\n    return np.mean([1])"})


# ---- multi ----------------------------------------------------------------------------------------------------------


def multi(formula: str, **graders: Any) -> dict[str, Any]:
    given = {
        "right": {**ANSWER, "operation": "eq"},
        "near": {**ANSWER, "type": "text_similarity", "evaluation_metric": "fuzzy_match"},
        "odd-name": {"type": "python", "source": "def grade(sample, item):\n    return 4"},
    }
    del given["near"]["name"]
    return {"type": "multi", "name": "m", "graders": {**given, **graders}, "calculate_output": formula}


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("0.5 * right + 0.5 * near", 0.5 * 0 + 0.5 * 0.75),
        ("(right + near) / 2 - -1", 1.375),
        ("near ^ 2", 0.5625),
        ("2 * near ^ 2 ** 1", 1.125),
        ("min(right, near, 0.5)", 0.0),
        ("max(right, near)", 0.75),
        ("abs(right - near)", 0.75),
        ("floor(near) + ceil(near)", 1.0),
        ("exp(right)", 1.0),
        ("sqrt(near * 3)", 1.5),
        ("log(exp(near))", 0.75),
        ("+near", 0.75),
        ("1", 1.0),
    ],
)
def test_formula(formula: str, expected: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert scored(multi(formula), "abcd", answer="abce") == pytest.approx(expected)
    assert capsys.readouterr().out == "{'right': 0.0, 'near': 0.75, 'odd-name': 4.0}\n"


@pytest.mark.parametrize(
    "formula",
    [
        "right + other",
        "__import__('os').system('true')",
        "right.__class__",
        "right if near else 0",
        "right and near",
        "right > near",
        "not right",
        "~right",
        "right // near",
        "right % near",
        "[right]",
        "'right'",
        "True",
        "lambda: right",
        "min(right)",
        "sqrt(right, near)",
        "abs()",
        "max(*right)",
        "log(x=right)",
        "pow(right, near)",
        "open(right)",
        "right; near",
        "(right := 1)",
        "1e999 * right",
        "",
        "right +",
        "1" + "0" * 400,
        "odd-name",
    ],
)
def test_formulas_that_are_refused(formula: str) -> None:
    with pytest.raises((ConfigError, RewardSourceError)):
        from_openai_grader(multi(formula))


def test_a_power_overflows_instead_of_hanging() -> None:
    for formula in ("9 ^ 9 ^ 9 ^ 9", "floor(9) ^ floor(9) ^ floor(9)"):
        with pytest.raises(OverflowError):
            scored(multi(formula), "abcd", answer="abce")


def test_multi_of_multi() -> None:
    inner = multi("near * 2")
    assert scored(multi("inner + near", inner=inner), "abcd", answer="abce") == pytest.approx(2.25)


# ---- score_model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    for name in ("JUDGE_MODEL", "JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Judge() as server:
        monkeypatch.setenv("JUDGE_URL", server.url)
        yield server


MODEL = {
    "type": "score_model",
    "name": "j",
    "model": "big",
    "input": [
        {"role": "system", "content": "Judge it."},
        {
            "role": "user",
            "content": {"type": "input_text", "text": "Is {{ sample.output_text }} like {{item.answer}}?"},
        },
    ],
    "range": [1, 5],
    "sampling_params": {"temperature": 0.5, "max_completions_tokens": 99},
}


def test_score_model(judge: Judge) -> None:
    judge.replies = ["Score: 4"]
    reward = from_openai_grader(MODEL)
    assert reward.source.startswith("async def reward")
    assert asyncio.run(reward.function("p", "7 {{item.answer}}", {"answer": "8"})) == pytest.approx(4.0)
    ((_, _, body),) = judge.requests
    assert [message["content"] for message in body["messages"]][:2] == ["Judge it.", "Is 7 {{item.answer}} like 8?"]
    assert body["messages"][2]["content"].endswith("from 1 to 5.")
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("big", 0.5, 99)


def test_score_model_inside_multi(judge: Judge) -> None:
    judge.replies = ["Score: 0.5"]
    grader = multi(
        "judged + near", judged={"type": "score_model", "model": "big", "input": "Judge {{sample.output_text}}"}
    )
    assert asyncio.run(from_openai_grader(grader).function("p", "abcd", {"answer": "abce"})) == pytest.approx(1.25)


# ---- refused by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grader", "says"),
    [
        ("{", "the grader is not JSON"),
        ([], "is not a JSON object"),
        ({"type": "label_model"}, "has type 'label_model'; known are string_check"),
        ({}, "has type None"),
        ({**ANSWER}, "needs the field 'operation'"),
        ({**ANSWER, "operation": "regex"}, "no operation 'regex'; known are eq, ne, like, ilike"),
        ({**ANSWER, "operation": "eq", "strict": True}, "has no field 'strict'"),
        ({**ANSWER, "operation": "eq", "input": "{{ env.KEY }}"}, "only item.<column> and sample"),
        ({**ANSWER, "operation": "eq", "input": "{{ item }}"}, "only item.<column> and sample"),
        ({**ANSWER, "operation": "eq", "input": "{{ item..x }}"}, "only item.<column> and sample"),
        ({**ANSWER, "operation": "eq", "input": "{{ sample.output_tools[0].name }}"}, "a completion is one text here"),
        ({**ANSWER, "operation": "eq", "input": "{{ sample.reasoning }}"}, "there is no such part"),
        ({**ANSWER, "operation": "eq", "input": 5}, "input of the grader is not a text"),
        ({**MODEL, "input": [{"role": "user", "content": {"type": "input_image"}}]}, "images and sounds"),
        ({**MODEL, "model": None, "more": 1}, "has no field 'more'"),
        ({"type": "multi", "graders": {}, "calculate_output": "1"}, "has no graders by name"),
    ],
)
def test_refused(grader: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_openai_grader(grader)


@pytest.mark.parametrize(
    ("metric", "reason"), [("cosine", "an embedding model"), ("meteor", "synonyms"), ("bert", "known are")]
)
def test_metrics_that_need_more_than_python_are_refused_with_the_reason(metric: str, reason: str) -> None:
    grader = {"type": "text_similarity", "input": "a", "reference": "b", "evaluation_metric": metric}
    with pytest.raises(ConfigError, match=reason):
        from_openai_grader(grader)
