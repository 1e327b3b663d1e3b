"""Tags, patterns, length and repetition: the shares they pay, and what a model might try."""

import pytest

from rewardsmith.rewards.library import format_tags, regex_match, repetition_penalty, soft_overlong

GOOD = "<think>first this</think>\n<answer>42</answer>"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOOD, 1.0),
        (GOOD + "\n", 1.0),
        ("<think>a</think><answer>b</answer>", 1.0),
        (" " + GOOD, 0.0),
        ("Sure! " + GOOD, 0.0),
        (GOOD + " Bye.", 0.0),
        (GOOD + GOOD, 0.0),
        ("<think></think>\n<answer>42</answer>", 0.0),
        ("<think>a</think>\n<answer> </answer>", 0.0),
        ("<answer>42</answer>\n<think>a</think>", 0.0),
        ("<think>a\n<answer>42</answer></think>", 0.0),
        ("<think>a</think> so <answer>42</answer>", 0.0),
        ("<think>a<think>b</think>\n<answer>42</answer>", 0.0),
        ("</think><think>a<answer>42</answer>", 0.0),
        ("<answer>42</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_tags(completion: str, expected: float) -> None:
    assert format_tags("", completion, {}) == expected


def test_tags_opened_by_the_prompt_and_other_tags() -> None:
    assert format_tags("", "a</think><answer>b</answer>", {}, opened=True) == 1.0
    assert format_tags("", "<think>a</think><answer>b</answer>", {}, opened=True) == 0.0
    assert format_tags("", "<sql>select 1</sql>", {}, tags=("sql",)) == 1.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOOD, 1.0),
        (GOOD + " Bye.", 0.8),
        ("<answer>42</answer>", 0.4),
        ("<think>", 0.2),
        ("<think>" * 9, 0.0),
        ("", 0.0),
    ],
)
def test_tags_in_part(completion: str, expected: float) -> None:
    assert format_tags("", completion, {}, partial=True) == pytest.approx(expected)


def test_pattern() -> None:
    assert regex_match("", "yes\nno", {"pattern": "yes.no"}) == 1.0
    assert regex_match("", "yes, no", {"pattern": "yes"}) == 0.0
    assert regex_match("", "yes, no", {"pattern": "yes"}, whole=False) == 1.0
    assert regex_match("", "ab12", {}, pattern=r"[a-z]+\d+") == 1.0
    assert regex_match("", "ab12\n", {}, pattern=r"[a-z]+\d+") == 0.0
    with pytest.raises(KeyError, match="pattern"):
        regex_match("", "x", {})


@pytest.mark.parametrize(
    ("words", "expected"), [(0, 0.0), (300, 0.0), (301, -0.01), (350, -0.5), (400, -1.0), (9000, -1.0)]
)
def test_overlong(words: int, expected: float) -> None:
    assert soft_overlong("", "word " * words, {}) == pytest.approx(expected)


def test_a_long_text_without_blanks_is_long() -> None:
    assert soft_overlong("", "x" * 16 * 400, {}) == -1.0
    assert soft_overlong("", "word " * 10, {}, longest=10, buffer=5) == -1.0
    with pytest.raises(ValueError, match="buffer"):
        soft_overlong("", "", {}, longest=10, buffer=0)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("one two three four", 0.0),
        ("a b c a b c", -0.25),
        ("A b c a B c", -0.25),
        ("spam " * 102, -0.99),
        ("a b", 0.0),
        ("", 0.0),
    ],
)
def test_repetition(completion: str, expected: float) -> None:
    assert repetition_penalty("", completion, {}) == pytest.approx(expected)
    assert repetition_penalty("", completion, {}, most=2.0) == pytest.approx(2 * expected)


def test_runs_of_another_length() -> None:
    assert repetition_penalty("", "a a a a", {}, n=1) == pytest.approx(-0.75)
