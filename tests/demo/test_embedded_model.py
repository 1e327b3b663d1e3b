"""The embedded base model: any text round-trips, the files are small and safe, and it answers in the right form."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewardsmith.demo import countdown

MODEL = Path(countdown.__file__).parent / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def random_text(rng):
    ranges = ((0, 0x20), (0x20, 0x7F), (0x20, 0x7F), (0x7F, 0x800), (0x800, 0xD800), (0xE000, 0x110000))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60)))


def round_trips(tokenizer, text):
    return tokenizer.decode(tokenizer.encode(text)) == text


def test_random_text_round_trips(tokenizer):
    rng = random.Random(0)
    for _ in range(3000):
        text = random_text(rng)
        assert round_trips(tokenizer, text), repr(text)


def test_text_cut_from_prompts_and_answers_round_trips(tokenizer):
    # Pieces of the phrases that are single tokens, with other text in between.
    rng = random.Random(1)
    source = countdown.prompt([3, 8, 12], 24) + "<think>\n3 * 8 = 24: no\n</think>\n<answer> (3 + 8) / 1 </answer>"
    for _ in range(2000):
        pieces = []
        for _ in range(rng.randrange(1, 5)):
            start = rng.randrange(len(source))
            pieces += [source[start : start + rng.randrange(200)], rng.choice(("", " ", "\n", "é", "7"))]
        text = "".join(pieces)
        assert round_trips(tokenizer, text), repr(text)


@pytest.mark.parametrize(
    "text",
    [
        "👩‍🔬 naïve café 数字 🎉",
        " don't , you 've n't . ? !",
        "  two  spaces\t\ttabs\r\nline ends\n\n",
        "Ġ Ċ ĉ Ã©",
        "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
        '{"name": "add", "arguments": {"a": 1.50, "b": -0007}}',
        "".join(map(chr, range(0x800))),
    ],
)
def test_chosen_text_round_trips(tokenizer, text):
    assert round_trips(tokenizer, text)


def test_every_byte_of_valid_utf8_has_a_token_of_its_own(tokenizer):
    lead = [chr(code) for code in (*range(0x80), *range(0x80, 0x800, 0x40), *range(0x800, 0xD800, 0x1000), 0x1F600)]
    for character in lead:
        assert len(tokenizer.encode(character)) <= len(character.encode())
        assert round_trips(tokenizer, character)


def test_numbers_round_trip_and_small_ones_are_one_token(tokenizer):
    for number in range(10_000):
        ids = tokenizer.encode(str(number))
        assert tokenizer.decode(ids) == str(number)
        assert len(ids) == 1 or number > countdown.LARGEST_VALUE


def test_documented_prompts_are_short(tokenizer):
    assert max(len(tokenizer.encode(row["prompt"])) for row in countdown.rows("train", 50)) <= 22


def test_chat_template_is_plain_chatml(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 8?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n3 + 8?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_turns_end_with_im_end_and_padding_is_another_token(tokenizer, model):
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_files_are_small_and_hold_no_code():
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(files.values()) < 1_300_000
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".md", ".jinja"}
    assert "auto_map" not in json.loads((MODEL / "config.json").read_text())


def test_weights_are_half_size_tied_and_under_a_million(model):
    with safe_open(MODEL / "model.safetensors", framework="pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118 (not a dict)
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"BF16"}  # noqa: SIM118
    assert sum(weight.numel() for weight in model.parameters()) < 600_000
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_ids_without_text_are_those_above_the_tokenizer(tokenizer, model):
    assert len(tokenizer) < model.config.vocab_size == -(-len(tokenizer) // 64) * 64
    assert all(tokenizer.convert_ids_to_tokens(i) is not None for i in range(len(tokenizer)))
    assert tokenizer.decode(list(range(len(tokenizer), model.config.vocab_size))) == ""


def test_it_keeps_the_form_and_leaves_grpo_something_to_find(tokenizer, model):
    rows = countdown.rows("held_out", 200)
    asked = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    torch.manual_seed(0)
    with torch.no_grad():
        ids = model.generate(**asked, max_new_tokens=96, do_sample=True, temperature=1.0, top_k=0)
    texts = tokenizer.batch_decode(ids[:, asked.input_ids.shape[1] :], skip_special_tokens=True)
    judged = list(zip(texts, rows, strict=True))
    assert sum(countdown.format_reward("", text, row) for text, row in judged) / len(rows) >= 0.97
    assert 0.2 < sum(countdown.equation_reward("", text, row) for text, row in judged) / len(rows) < 0.6
