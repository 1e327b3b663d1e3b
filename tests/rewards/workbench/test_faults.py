"""Folding of errors: what is the same, where it is, and which example stands for it."""

from rewardsmith.rewards.outcomes import Outcome, Score
from rewardsmith.rewards.workbench.faults import Call, Origin, failed, fold

TRACEBACK = """\
Traceback (most recent call last):
  File "<reward function answer>", line 2, in answer
    return inner(completion)
  File "<reward function answer>", line {line}, in inner
    return float(text)
ValueError: could not convert string to float: {text!r}
"""
STACK = """\
no result after 5 s
Current thread 0x00007f (most recent call first):
  File "<reward function answer>", line 9 in grind
  File "<reward function answer>", line 4 in answer
"""


def call(row: int, text: str, outcome: Outcome, error: str | None = None) -> Call:
    return Call(row, text, Score(outcome, 0.0, 0.001, "", error))


def raised(row: int, text: str, line: int = 5) -> Call:
    return call(row, text, "exception", TRACEBACK.format(line=line, text=text))


def test_the_same_error_on_the_same_line_is_one_whatever_it_says_of_the_text() -> None:
    faults = fold([raised(3, "one"), raised(1, "two"), raised(2, "three", line=6)], None)
    assert [(fault.count, fault.where, fault.row, fault.completion) for fault in faults] == [
        (2, "line 5", 3, "one"),
        (1, "line 6", 2, "three"),
    ]
    assert faults[0].error == "ValueError: could not convert string to float: 'one'"
    assert faults[0].detail.startswith("Traceback")


def test_the_most_frequent_comes_first() -> None:
    faults = fold([raised(0, "a", line=1), raised(0, "b", line=2), raised(0, "c", line=2)], None)
    assert [fault.where for fault in faults] == ["line 2", "line 1"]


def test_lines_are_those_of_the_users_file() -> None:
    (fault,) = fold([raised(0, "a", line=5)], Origin("rewards.py", 20))
    assert fault.where == "rewards.py, line 24"


def test_the_stack_of_a_call_that_was_killed_names_its_newest_frame_first() -> None:
    (fault,) = fold([call(0, "a", "timeout", STACK)], None)
    assert (fault.where, fault.error) == ("line 9", "no result after 5 s")


def test_an_error_without_a_line_has_none() -> None:
    (fault,) = fold([call(0, "a", "not_a_number", "returned a str; return an int or a float")], Origin("f.py", 3))
    assert fault.where == ""


def test_only_the_functions_own_failures_count() -> None:
    calls = [call(0, "a", "ok"), call(0, "a", "abstain"), call(0, "a", "infrastructure", "no worker")]
    assert fold(calls, None) == []
    assert not any(failed(one.score) for one in calls)
    assert failed(raised(0, "a").score)
