"""What is the plain engine's own: how it divides prompts into batches."""

import pytest
from engines import PROMPTS, adapted, generate, ids, make_engine
from tiny_models import CONTEXT, tokenizer

from rewardsmith.config import SamplingParamsConfig
from rewardsmith.rollout.plain import PlainEngine, _cache_bytes_per_token


def test_batches_that_exceed_the_cache_change_nothing(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine("plain", adapted("qwen2"))
    params = SamplingParamsConfig(max_tokens=12)
    expected = generate(engine, PROMPTS, 4, params)
    monkeypatch.setattr("rewardsmith.rollout.plain.CACHE_BYTES", 1)
    assert ids(generate(engine, PROMPTS, 4, params)) == ids(expected)


def test_a_group_larger_than_the_cache_is_sampled_in_parts(monkeypatch: pytest.MonkeyPatch):
    model = adapted("qwen2")
    engine = PlainEngine(model, tokenizer())
    params = SamplingParamsConfig(max_tokens=12)
    expected = generate(engine, PROMPTS, 8, params)
    room = 3 * (3 + 12)  # three rows of the prompts with three tokens, one of the longest one
    monkeypatch.setattr("rewardsmith.rollout.plain.CACHE_BYTES", room * _cache_bytes_per_token(engine._config))
    rows: list[int] = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert ids(generate(engine, PROMPTS, 8, params)) == ids(expected)
    assert max(rows) == 3


def test_the_cache_is_planned_by_what_fits_the_context(monkeypatch: pytest.MonkeyPatch):
    engine = PlainEngine(adapted("qwen2"), tokenizer())
    monkeypatch.setattr("rewardsmith.rollout.plain.CACHE_BYTES", 8 * CONTEXT * _cache_bytes_per_token(engine._config))
    assert list(engine._batches([[5], [6]], 4, 10**7)) == [([0, 1], range(4))]


def test_each_prompt_is_read_once_and_finished_rows_leave_the_batch():
    model = adapted("qwen2")
    shapes: list[tuple[int, ...]] = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate(PlainEngine(model, tokenizer()), PROMPTS, 16, SamplingParamsConfig(max_tokens=40))
    assert shapes[0] == (len(PROMPTS), max(map(len, PROMPTS)))
    rows = [shape[0] for shape in shapes[1:]]
    assert rows[0] == 64 and rows == sorted(rows, reverse=True) and rows[-1] < 32
    assert {shape[1] for shape in shapes[1:]} == {1}
