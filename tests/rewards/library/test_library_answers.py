"""Exact and numeric match: what is right, what is not, and what a model might try."""

from typing import Any

import pytest

from rewardsmith.rewards.library import exact_match, numeric_match

# ---- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("Paris", "Paris", 1.0),
        ("  Paris\n", "Paris", 1.0),
        ("paris", "Paris", 0.0),
        ("It is Paris", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("18", 18, 1.0),
        ("rouge", ["red", "rouge"], 1.0),
        ("blue", ["red", "rouge"], 0.0),
    ],
)
def test_exact(completion: str, answer: Any, expected: float) -> None:
    assert exact_match("", completion, {"answer": answer}) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("The  Beatles!", "beatles", 1.0),
        ("an apple, a day", "apple day", 1.0),
        ("U.S.", "US", 1.0),
        ("A", "A", 1.0),
        ("", "A", 0.0),
        ("the", "A", 0.0),
        ("an", "a", 0.0),
        ("B", "A", 0.0),
        ("!", "?", 0.0),
        ("beatles or stones", "beatles", 0.0),
    ],
)
def test_exact_and_loose(completion: str, answer: str, expected: float) -> None:
    assert exact_match("", completion, {"answer": answer}, loose=True) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("thinking ... <answer> Paris </answer>", 1.0),
        ("<answer>Paris</answer><answer>Lyon</answer>", 0.0),
        ("<answer>Lyon</answer><answer>Paris</answer>", 0.0),
        ("<answer>Paris<answer></answer>", 0.0),
        ("</answer>Paris<answer>", 0.0),
        ("<answer>Paris", 0.0),
        ("Paris", 0.0),
    ],
)
def test_exact_inside_a_tag(completion: str, expected: float) -> None:
    assert exact_match("", completion, {"answer": "Paris"}, tag="answer") == expected


@pytest.mark.parametrize("answer", ["", "  ", [], ["x", ""], {"target": "x"}, [["x"]]])
def test_a_row_without_a_usable_reference_is_an_error_and_no_zero(answer: Any) -> None:
    with pytest.raises(ValueError, match="column 'answer' needs a text, a number or a list"):
        exact_match("", "", {"answer": answer})


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("so #### 18", 1.0),
        ("####18", 1.0),
        ("#### $18.00", 1.0),
        ("#### 18.", 1.0),
        ("#### +18 apples", 1.0),
        ("#### 17\nno, #### 18", 1.0),
        ("#### 18\nno, #### 17", 0.0),
        ("#### 1,8", 0.0),
        ("#### 018", 1.0),
        ("#### -18", 0.0),
        ("#### 180", 0.0),
        ("#### 18 million? #### ", 1.0),
        ("18", 0.0),
        ("### 18", 0.0),
        ("#### eighteen", 0.0),
        ("", 0.0),
        ("#### 18" + " " * 300, 0.0),
        ("x" * 1000 + "#### 18", 1.0),
    ],
)
def test_number_after_the_mark(completion: str, expected: float) -> None:
    assert numeric_match("", completion, {"answer": "18"}) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("that makes 1,234.50 dollars", "1234.5", 1.0),
        ("2 + 3 = 5", "5", 1.0),
        ("5-3", "3", 1.0),
        ("x=-3", "-3", 1.0),
        ("(2)-3", "-3", 0.0),
        ("17, 18, 19", "18", 0.0),
        ("1234" + " " * 299, "34", 0.0),
        ("v2", "2", 0.0),
        ("none", "0", 0.0),
        ("0", "-0", 1.0),
        ("12345678901234567890123456789012345678901", "12345678901234567890123456789012345678902", 0.0),
    ],
)
def test_number_anywhere(completion: str, answer: str, expected: float) -> None:
    assert numeric_match("", completion, {"answer": answer}, anywhere=True) == expected


def test_form_tolerance_and_column() -> None:
    row = {"gold": 2.5}
    assert numeric_match("", "#### 2.4", row, column="gold", wrong=0.1) == 0.1
    assert numeric_match("", "2.5", row, column="gold", wrong=0.1) == 0.0
    assert numeric_match("", "#### 2.4", row, column="gold", tolerance=0.11) == 1.0
    assert numeric_match("", "#### 2.4", row, column="gold", tolerance=0.09) == 0.0
    assert numeric_match("", "#### 1,000", {"answer": "9 * 111 + 1 = ...\n#### 1,000"}) == 1.0


@pytest.mark.parametrize("answer", ["", "many", None, "1e3", "#### "])
def test_a_row_without_a_number_is_an_error_and_no_zero(answer: Any) -> None:
    with pytest.raises(ValueError, match="column 'answer' holds no number"):
        numeric_match("", "#### 1", {"answer": answer})
