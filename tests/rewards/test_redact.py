"""Values of secrets do not appear in texts, however a program happens to have written them."""

import json
from urllib.parse import quote

import pytest

from rewardsmith.rewards.inside.frames import KEPT_BYTES
from rewardsmith.rewards.inside.judge import cut
from rewardsmith.rewards.inside.prints import Capture, Prints
from rewardsmith.rewards.redact import redactor, shown_after_all

KEY = 'sk-"lärm"/4f&%7\\b9 x'
PEM = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0\nab\n-----END KEY-----\n"


@pytest.mark.parametrize(
    "text",
    [KEY, f"{KEY!r}", json.dumps({"k": KEY}), json.dumps([KEY], ensure_ascii=False), f"https://x/?k={quote(KEY)}&a=1"],
    ids=["plain", "repr", "json", "json of utf-8", "url"],
)
def test_a_value_is_hidden_in_every_common_spelling(text: str) -> None:
    clean = redactor({"API_KEY": KEY})(f"before {text} after")
    assert "[secret API_KEY]" in clean and "4f" not in clean
    assert clean.startswith("before ") and clean.endswith(" after")


def test_each_line_of_a_long_value_is_hidden_too() -> None:
    clean = redactor({"PEM": PEM})("line 2 is MIIEvQIBADANBgkqhkiG9w0, line 3 is ab")
    assert clean == "line 2 is [secret PEM], line 3 is ab"


def test_a_value_in_another_one_is_hidden_with_it() -> None:
    redact = redactor({"SHORT": "token", "LONG": "token-of-another"})
    assert redact("token-of-another token") == "[secret LONG] [secret SHORT]"


def test_a_value_that_is_a_word_is_not_hidden_and_that_is_known() -> None:
    secrets = {"RETRIES": "3", "KEY": "long enough"}
    assert redactor(secrets)("3 of 3: long enough") == "3 of 3: [secret KEY]"
    assert shown_after_all(secrets) == ["RETRIES"]


@pytest.mark.parametrize("left", range(4, len(KEY)))
def test_what_is_left_of_a_value_where_prints_are_cut_is_hidden(left: int) -> None:
    prints = Prints(2**20)
    capture: Capture = prints.begin_in_context()
    size = KEPT_BYTES - len(KEY[:left].encode())
    prints.write(("." * size + KEY + "and more").encode())
    clean = redactor({"API_KEY": KEY})(capture.text().decode())
    assert clean.startswith("." * size + "[secret API_KEY]\n[")


@pytest.mark.parametrize("left", range(4, len(KEY)))
def test_what_is_left_of_a_value_where_an_error_is_cut_is_hidden(left: int) -> None:
    half = KEPT_BYTES // 2
    ends, begins = "." * (half - len(KEY[:left].encode())) + KEY, KEY + "." * (half - len(KEY[-left:].encode()))
    clean = redactor({"API_KEY": KEY})(cut(ends + "-" * half + begins).decode())
    head, _, tail = clean.split("\n")
    assert head.endswith(".[secret API_KEY]") and tail.startswith("[secret API_KEY].")


def test_without_secrets_a_text_is_what_it_was() -> None:
    text = "[3 bytes cut] [12 more bytes were printed]"
    assert redactor({})(text) == text
    assert redactor({"A": "nothing of this"})(text) == text
