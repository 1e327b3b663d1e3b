"""The texts of the probes: what they hold, in which forms they come, what they are made of."""

from typing import Any

import pytest

from rewardsmith.rewards.pool import Group
from rewardsmith.rewards.workbench.probes import LONG, PROBES, REPEATED, forms, probes

PLAIN = "def f(prompt, completion, example):\n    return 1.0\n"
TAGGED = """
def f(prompt, completion, example):
    import re

    found = re.search(r"<think>(?P<why>.*?)</think>\\n<answer>(.*?)</answer>", completion)
    return float(bool(found))
"""
MARKED = '''
def f(prompt, completion, example):
    """Looks behind #### and in \\\\boxed{}."""
    return float("#### " in completion)
'''


def texts_of(examples: list[dict[str, Any]], *sources: str) -> list[dict[str, list[str]]]:
    groups = [Group(example.get("prompt", "Question?"), example, []) for example in examples]
    return probes(groups, sources or (PLAIN,))


def dressed(*sources: str) -> list[str]:
    return [form.of("X") for form in forms(sources)]


def test_answers_are_dressed_as_the_sources_look_for_them() -> None:
    assert dressed(PLAIN) == ["X"]
    assert dressed(TAGGED) == ["X", "<think>Let me see.</think>\n<answer>X</answer>"]
    assert dressed(MARKED) == ["X", "#### X", r"\boxed{X}"]


def test_the_tag_that_holds_the_answer_comes_last_whatever_comes_first_in_the_sources() -> None:
    turned = (
        'def f(prompt, completion, example):\n    return float("<answer>" in completion and "<why>" in completion)\n'
    )
    assert dressed(turned)[1] == "<why>Let me see.</why>\n<answer>X</answer>"


def test_a_setting_names_a_tag() -> None:
    text = 'def f(prompt, completion, example, *, tag="final", tags=("a", "b"), other="c"):\n    return 0.0\n'
    assert dressed(text)[1] == "<a>Let me see.</a>\n<b>Let me see.</b>\n<final>X</final>"


def test_groups_of_regular_expressions_are_no_tags() -> None:
    assert "why" not in dressed(TAGGED)[1]


def test_every_probe_is_made_for_every_row() -> None:
    rows = [{"prompt": f"Question {n}?", "answer": str(n)} for n in (10, 20, 30)]
    made = texts_of(rows, TAGGED)
    assert all(list(row) == list(PROBES) for row in made)
    assert made[1]["empty"] == [""]
    assert made[1]["echo"] == ["Question 20?", "<think>Let me see.</think>\n<answer>Question 20?</answer>"]
    assert len(made[0]["long"][0]) == LONG
    assert made[0]["tags"] == ["\n".join(["<think></think>\n<answer></answer>"] * REPEATED)]
    assert made[2]["reference"] == ["30", "<think>Let me see.</think>\n<answer>30</answer>"]


def test_the_right_answer_is_neither_the_first_nor_the_last_that_is_named() -> None:
    rows = [{"prompt": "?", "answer": str(n)} for n in (11, 22, 33, 44)]
    for row, texts in zip(rows, texts_of(rows), strict=True):
        for kind in ("hidden", "listed"):
            (text,) = texts[kind]
            named = [word.strip(".,") for word in text.split() if word.strip(".,").isdigit()]
            assert row["answer"] in named[1:-1]
    assert set(texts_of(rows)[0]["listed"][0].split("\n")) == {"11", "22", "33", "44"}


def test_each_candidate_comes_in_the_form_that_is_looked_for() -> None:
    rows = [{"prompt": "?", "answer": str(n)} for n in (1, 2, 3)]
    assert texts_of(rows, MARKED)[1]["listed"][1] == "#### 1\n#### 2\n#### 3"


def test_wrong_answers_are_made_up_where_the_rows_have_none() -> None:
    assert texts_of([{"prompt": "?", "answer": "7"}])[0]["listed"] == ["8\n9\n10\n12\n7\n15\n20\n28\n41"]
    (text,) = texts_of([{"prompt": "?", "answer": "yes"}])[0]["hidden"]
    assert "It could be something else, yes or none of these." in text


def test_another_column_s_right_answer_is_no_wrong_one() -> None:
    rows: list[dict[str, Any]] = [{"prompt": "?", "a": 1, "b": 2}, {"prompt": "?", "a": 2, "b": 5}]
    first = texts_of(rows)[0]["listed"][0].split("\n")
    assert first[0] not in ("1", "2") and first[-1] not in ("1", "2")


def test_what_is_in_lists_and_objects_counts_and_long_texts_do_not() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "?", "split": "train", "ok": True, "none": None, "many": ["x", {"deep": "y"}], "long": "w " * 100},
        {"prompt": "?", "many": ["p", "q"]},
    ]
    made = texts_of(rows)[0]
    assert made["listed"] == ["p\nx\ny\nq"]
    assert made["reference"] == ['["x", {"deep": "y"}]', "x", "y", "w " * 100]


@pytest.mark.parametrize("row", [{"prompt": "?"}, {"prompt": "?", "split": "train", "none": None}])
def test_rows_without_an_answer_have_no_probes_about_it(row: dict[str, Any]) -> None:
    assert list(texts_of([row])[0]) == ["empty", "echo", "long"]
