import pytest
from tiny_models import tokenizer
from tokenizers import processors

from rewardsmith.errors import ModelError
from rewardsmith.rollout.prompts import make_prompts

ROWS = [(0, {"prompt": "ab", "n": 1}), (4, {"prompt": "abcdef", "n": [2]})]


def ids_of(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


def test_text_goes_in_as_it_is_and_the_whole_row_comes_along():
    prompts, left_out = make_prompts(ROWS, tokenizer(), apply_chat_template=False, max_tokens=None)
    assert left_out == 0
    assert [(p.row, p.text, p.ids, p.example) for p in prompts] == [
        (0, "ab", ids_of("ab"), {"prompt": "ab", "n": 1}),
        (4, "abcdef", ids_of("abcdef"), {"prompt": "abcdef", "n": [2]}),
    ]


def test_rows_that_are_too_long_are_left_out_and_counted():
    prompts, left_out = make_prompts(ROWS, tokenizer(), apply_chat_template=False, max_tokens=5)
    assert ([p.row for p in prompts], left_out) == ([0], 1)


def test_a_chat_template_makes_one_user_turn_and_keeps_the_users_text():
    chatty = tokenizer()
    chatty.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}"
    )
    (prompt, _), _ = make_prompts(ROWS, chatty, apply_chat_template=True, max_tokens=None)
    assert chatty.decode(prompt.ids) == "u ab<end>a "
    assert prompt.text == "ab"


def test_a_missing_chat_template_is_named():
    with pytest.raises(ModelError, match="no chat template"):
        make_prompts(ROWS, tokenizer(), apply_chat_template=True, max_tokens=None)


def test_special_tokens_once_at_the_beginning_and_none_at_the_end():
    wrapping = tokenizer()
    wrapping.bos_token = "<end>"
    wrapping.backend_tokenizer.post_processor = processors.TemplateProcessing("<end> $A <end>", None, [("<end>", 1)])
    assert wrapping("ab")["input_ids"] == [1, *ids_of("ab"), 1]
    rows = [(0, {"prompt": "ab"}), (1, {"prompt": "<end>ab"})]
    prompts, _ = make_prompts(rows, wrapping, apply_chat_template=False, max_tokens=None)
    assert [p.ids for p in prompts] == [[1, *ids_of("ab")]] * 2


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ModelError, match="row 3 has no tokens"):
        make_prompts([(3, {"prompt": ""})], tokenizer(), apply_chat_template=False, max_tokens=None)
