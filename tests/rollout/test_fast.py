"""What is the fast engine's own: sharing, slots, cache, continuous batching. Numbers: test_engine."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import (
    PROMPTS,
    VOCAB,
    adapted,
    generate,
    ids,
    largest_error,
    make_engine,
    seeds_for,
    weights_of,
    whole_logps,
)
from reference_attention import reference_logits
from tiny_models import ALL_FAMILIES, CONTEXT, random_model, tokenizer

from rewardsmith.config import SamplingParamsConfig
from rewardsmith.errors import ModelError
from rewardsmith.rollout import sampling
from rewardsmith.rollout.engine import with_text
from rewardsmith.rollout.fast import batch as batching
from rewardsmith.rollout.fast import graphs
from rewardsmith.rollout.fast.batch import Batch, Request
from rewardsmith.rollout.fast.cache import Cache, pages_for
from rewardsmith.rollout.fast.decode import Decoder
from rewardsmith.rollout.fast.engine import FastEngine
from rewardsmith.rollout.fast.kernels import TorchKernels
from rewardsmith.rollout.model.architecture import describe
from rewardsmith.rollout.model.weights import Weights

PARAMS = SamplingParamsConfig(max_tokens=24)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_float64_log_probs_are_exact(family: str):
    """Against dense attention over the whole text in float64. transformers itself rounds norms to float32 inside."""
    model = adapted(family, torch.float64)
    engine = make_engine("torch", model, slots=6)
    for prompt, group in zip(PROMPTS, generate(engine, PROMPTS, 3, PARAMS), strict=True):
        for completion in group:
            whole = reference_logits(engine._weights, prompt + completion.ids, VOCAB)[len(prompt) - 1 : -1]
            chosen = whole.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
            assert (chosen - torch.tensor(completion.logps, dtype=torch.float64)).abs().max() < 1e-12
            assert largest_error(model, prompt, completion, 1.0) < 5e-6


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_plain_engine(family: str):
    model = adapted(family, torch.bfloat16)
    exact = adapted(family).double()
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    errors = {}
    for kind in ("plain", "torch"):
        groups = generate(make_engine(kind, model, **({} if kind == "plain" else {"merge": False})), PROMPTS, 4, PARAMS)
        errors[kind] = max(
            largest_error(exact, prompt, completion, 1.0)
            for prompt, group in zip(PROMPTS, groups, strict=True)
            for completion in group
        )
    assert 0 < errors["torch"] < 2 * errors["plain"]


@pytest.mark.parametrize("kind", ["native", "torch"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_number_of_slots_changes_nothing(family: str, kind: str):
    model = adapted(family)
    expected = ids(generate(make_engine(kind, model), PROMPTS, 8, PARAMS))
    for slots in (1, 5, 9):
        assert ids(generate(make_engine(kind, model, slots=slots), PROMPTS, 8, PARAMS)) == expected


def test_slots_are_refilled_as_soon_as_a_sequence_ends():
    engine = make_engine("native", adapted("qwen2"), slots=6)
    running = []
    step = engine.batch.step
    engine.batch.step = lambda: running.append(step()) or running[-1]  # type: ignore[func-returns-value]
    groups = generate(engine, PROMPTS, 8, PARAMS)
    rows = [len(done.requests) for done in running]
    tokens = sum(len(completion.ids) for group in groups for completion in group)
    assert sum(rows) == tokens
    waiting = 4 * 8
    for done in running:  # full as long as somebody waits
        waiting -= len(done.finished)
        assert len(done.requests) == 6 or waiting < 6


@pytest.mark.parametrize("merge", [True, False])
def test_the_adapter_is_applied_merged_or_beside_the_weights(merge: bool):
    model = adapted("qwen3")
    engine = make_engine("native", model, merge=merge)
    assert engine._weights.merged == merge
    for prompt, group in zip(PROMPTS, generate(engine, PROMPTS, 2, PARAMS), strict=True):
        assert max(largest_error(model, prompt, completion, 1.0) for completion in group) < 1e-4


def counted_reads(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Lengths of the prompts of each forward that reads prompts."""
    reads: list[list[int]] = []
    read = decoder.read
    monkeypatch.setattr(decoder, "read", lambda prompts: reads.append([len(p.ids) for p in prompts]) or read(prompts))
    return reads


def test_a_prompt_is_read_once_and_its_pages_are_shared(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine("native", adapted("qwen2"), slots=16)
    decoder = engine.batch._decoder
    reads = counted_reads(decoder, monkeypatch)
    most = []
    grow = Cache.grow
    monkeypatch.setattr(Cache, "grow", lambda cache, pages: (grow(cache, pages), most.append(cache.pages)))
    generate(engine, PROMPTS, 4, PARAMS)
    # The first and the last prompt are equal.
    assert reads == [[3, 1, 18]]
    assert most == [sum(pages_for(n) for n in (3, 1, 18)) + 16 * pages_for(PARAMS.max_tokens)]


def test_prompts_are_read_together_up_to_a_number_of_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batching, "PROMPT_TOKENS", 4)
    engine = make_engine("native", adapted("qwen2"))
    reads = counted_reads(engine.batch._decoder, monkeypatch)
    expected = ids(generate(make_engine("plain", adapted("qwen2")), PROMPTS, 2, PARAMS))
    assert ids(generate(engine, PROMPTS, 2, PARAMS)) == expected
    assert reads == [[3, 1], [18]]


def test_nothing_is_kept_when_nothing_runs():
    engine = make_engine("native", adapted("qwen2"), slots=5)
    generate(engine, PROMPTS, 4, PARAMS)
    groups = engine.generate(PROMPTS, 4, PARAMS, seeds_for(16))
    next(groups)
    assert engine.batch._decoder.cache.pages
    groups.close()
    batch = engine.batch
    assert (
        batch.idle
        and not batch._prompts
        and not batch._decoder.cache.pages
        and sorted(batch._free_slots) == list(range(5))
    )


@pytest.mark.parametrize("pages", [1, 6, 9, 20])
def test_a_small_cache_is_waited_for(pages: int):
    model = adapted("qwen2")
    expected = ids(generate(make_engine("native", model), PROMPTS, 4, PARAMS))
    engine = make_engine("native", model)
    page_bytes = engine.batch._decoder.cache.page_bytes
    assert page_bytes == 2 * 2 * 2 * 16 * (8 + 16) // 2 * 2 * 2  # layers, heads, tokens, (dim + padded dim), 4 bytes
    small = make_engine("native", model, cache_bytes=pages * page_bytes)
    held = []
    step = small.batch.step
    small.batch.step = lambda: held.append(small.batch._decoder.cache.pages) or step()  # type: ignore[func-returns-value]
    assert ids(generate(small, PROMPTS, 4, PARAMS)) == expected
    # One sequence of the longest prompt runs in any case.
    assert max(held) <= max(pages, pages_for(18) + pages_for(24) + 1)


def failing_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Memory runs out in the given call, from 1, of one of its methods."""
    whole, calls = getattr(owner, name), []

    def failing(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise MemoryError
        return whole(*arguments)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(("part", "call"), [("read", 1), ("read", 2), ("step", 3), ("logits", 1), ("logits", 4)])
def test_a_step_that_fails_leaves_nothing_half_done(part: str, call: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batching, "PROMPT_TOKENS", 4)
    model = adapted("qwen2")
    expected = ids(generate(make_engine("native", model, slots=6), PROMPTS, 4, PARAMS))
    engine = make_engine("native", model, slots=6)
    batch = engine.batch
    failing_once(monkeypatch, batch._decoder, part, call)
    with pytest.raises(MemoryError):
        generate(engine, PROMPTS, 4, PARAMS)
    assert batch.idle and not batch._prompts and not batch._decoder.cache.pages
    assert sorted(batch._free_slots) == list(range(6))
    assert ids(generate(engine, PROMPTS, 4, PARAMS)) == expected


def test_what_waits_outlives_a_step_that_fails(monkeypatch: pytest.MonkeyPatch):
    """With its prompt, which was read for the one that was running."""
    model = adapted("qwen2")
    batch = new_batch(model, slots=1)
    for key in ("running", "waiting"):
        batch.submit(request(key, [5, 6, 7]))
    batch.step()
    failing_once(monkeypatch, batch._decoder, "step", 1)
    with pytest.raises(MemoryError):
        batch.step()
    rest = dict(run_all(batch))
    assert rest.keys() == {"waiting"}
    assert largest_error(model, [5, 6, 7], rest["waiting"], 1.0) < 1e-4


@pytest.mark.parametrize("kind", ["plain", "native"])
def test_more_possible_ids_than_can_be_kept_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = adapted("qwen2")
    for most, cut in ((24 * 4, {"top_k": 4}), (24 * 4, {"top_k": 4, "top_p": 0.99})):
        monkeypatch.setattr(sampling, "MOST_IDS", most)
        generate(make_engine(kind, model), PROMPTS, 2, SamplingParamsConfig(max_tokens=24, **cut))
    flat = SamplingParamsConfig(max_tokens=24, top_p=0.99, temperature=5.0)
    engine = make_engine(kind, model)
    with pytest.raises(ModelError, match=r"from more than 96 ids in all, .* Set sampling_params.top_k"):
        generate(engine, PROMPTS, 2, flat)
    assert len(generate(engine, PROMPTS, 2, PARAMS)) == len(PROMPTS)


def test_groups_come_as_soon_as_they_are_finished_and_may_differ_in_size():
    engine = make_engine("native", adapted("qwen2"), slots=4)
    steps = []
    step = engine.batch.step
    engine.batch.step = lambda: steps.append(1) or step()  # type: ignore[func-returns-value]
    came = [(i, len(group), len(steps)) for i, group in engine.generate(PROMPTS, [3, 1, 2, 4], PARAMS, seeds_for(10))]
    assert sorted((i, size) for i, size, _ in came) == [(0, 3), (1, 1), (2, 2), (3, 4)]
    assert came[0][2] < came[-1][2] == len(steps)
    expected = dict(engine.generate(PROMPTS[:1], 3, PARAMS, seeds_for(10)[:3]))
    assert [c.ids for c in dict(engine.generate(PROMPTS, [3, 1, 2, 4], PARAMS, seeds_for(10)))[0]] == [
        c.ids for c in expected[0]
    ]


def test_without_a_tokenizer_the_text_is_added_later():
    model, words = adapted("qwen2"), tokenizer()
    with_words = generate(make_engine("native", model), PROMPTS, 2, PARAMS)
    engine = FastEngine(weights_of(model), stop_ids=[1], vocab=VOCAB)
    for prompt, group, expected in zip(PROMPTS, generate(engine, PROMPTS, 2, PARAMS), with_words, strict=True):
        assert {completion.text for completion in group} == {""}
        decode = engine_decode(words)
        assert [with_text(completion, prompt, decode, [1]).text for completion in group] == [c.text for c in expected]


def engine_decode(words: Any):
    from rewardsmith.rollout.engine import decoder

    return decoder(words)


# ---- requests one by one, as serving has them ----


def new_batch(model: Any, **settings: Any) -> Batch:
    return make_engine("native", model, **settings).batch


def request(key: str, prompt: list[int], **params: Any) -> Request:
    return Request(key, prompt, 7, SamplingParamsConfig(**({"max_tokens": 10} | params)))


def run_all(batch: Batch) -> Iterator[tuple[str, Any]]:
    while not batch.idle:
        yield from ((asked.key, completion) for asked, completion in batch.step().finished)  # type: ignore[misc]


def test_requests_join_and_leave_while_others_run_and_each_is_as_if_alone():
    model = adapted("gemma3")
    asked = [
        request("plain", [5, 6, 7], max_tokens=30),
        request("hot", [5, 6, 7], temperature=3.0),
        request("cut", PROMPTS[2], top_k=4, max_tokens=20),
        request("one", [9], max_tokens=1),
        request("nucleus", [9, 9], top_p=0.5, min_p=0.05, temperature=0.7),
        request("stop", [11], stop=["a", "e", "i", "o", "u"], max_tokens=40),
    ]
    alone = {}
    for one in asked:
        batch = new_batch(model)
        batch.submit(one)
        alone |= dict(run_all(batch))
    batch, together, streamed = new_batch(model, slots=4), {}, {one.key: [] for one in asked}
    waiting = list(asked)
    while waiting or not batch.idle:
        if waiting:
            batch.submit(waiting.pop(0))
        step = batch.step()
        for one, token in zip(step.requests, step.ids_N.tolist(), strict=True):
            streamed[one.key].append(token)
        together |= {one.key: completion for one, completion in step.finished}
    assert {key: c.ids for key, c in together.items()} == {key: c.ids for key, c in alone.items()} == streamed
    for one in asked:
        completion, params = together[one.key], one.params
        assert largest_error(model, one.prompt, completion, params.temperature) < 1e-4
        assert completion.text == alone[one.key].text
        assert (completion.support is not None) == (one.key in ("cut", "nucleus"))
    assert together["stop"].finish_reason == "stop" and not set(together["stop"].text) & set("aeiou")


def test_a_longer_request_than_all_before_finds_room_in_the_running_batch():
    model = adapted("llama")
    batch, done = new_batch(model), {}
    batch.submit(request("short", [5], max_tokens=30))
    batch.step()
    batch.submit(request("long", [3] * 20, max_tokens=44))
    done = dict(run_all(batch))
    assert len(done["long"].ids) > 1
    for key, prompt in (("short", [5]), ("long", [3] * 20)):
        assert largest_error(model, prompt, done[key], 1.0) < 1e-4


def test_a_canceled_request_is_heard_of_no_more_and_disturbs_nobody():
    model = adapted("qwen2")
    batch = new_batch(model, slots=2)
    for key in ("first", "second", "third", "fourth"):
        batch.submit(Request(key, [5, 6, 7], hash(key) % 1000, SamplingParamsConfig(max_tokens=40, top_k=20)))
    batch.step()
    running = [asked.key for asked in batch.step().requests]
    batch.cancel({running[0], "fourth", "unknown"})
    rest = dict(run_all(batch))
    assert rest.keys() == {"first", "second", "third"} - {running[0]}
    assert all(largest_error(model, [5, 6, 7], completion, 1.0) < 1e-4 for completion in rest.values())
    batch.submit(request("later", [9]))
    assert dict(run_all(batch)).keys() == {"later"}


def test_a_request_that_leaves_no_room_is_refused_and_the_others_go_on():
    batch = new_batch(adapted("qwen2"))
    batch.submit(request("good", [5]))
    with pytest.raises(ModelError, match="fills the model's context"):
        batch.submit(request("bad", [3] * CONTEXT))
    assert dict(run_all(batch)).keys() == {"good"}


def test_long_prompts_and_windows_over_many_pages():
    """Prompts and completions of several pages, windows that begin inside either and within a page."""
    for family, window in (("mistral", 21), ("gemma2", 40), ("llama", None)):
        changes = {"max_position_embeddings": 256} | ({"sliding_window": window} if window else {})
        model = random_model(family, **changes)
        prompts = [[(7 * i + i * i) % VOCAB for i in range(n)] for n in (70, 33, 16, 101)]
        for kernels in (None, TorchKernels(describe(model))):
            engine = FastEngine(
                Weights.fuse(model, describe(model)), stop_ids=[], vocab=VOCAB, slots=6, kernels=kernels
            )
            groups = generate(engine, prompts, 3, SamplingParamsConfig(max_tokens=70))
            for prompt, group in zip(prompts, groups, strict=True):
                assert max(largest_error(model, prompt, completion, 1.0) for completion in group) < 1e-4


def test_rows_that_fill_up_a_cuda_graph_change_nothing(monkeypatch: pytest.MonkeyPatch):
    model = adapted("gemma2")
    expected = ids(generate(make_engine("native", model), PROMPTS, 3, PARAMS))
    engine = make_engine("native", model)
    step, seen = engine.batch._decoder.step, []

    def wider(rows: Any, tables: Any) -> torch.Tensor:
        seen.append((len(rows), graphs.rounded_up(len(rows))))
        return step(graphs.padded(rows, graphs.rounded_up(len(rows))), tables)[: len(rows)]

    monkeypatch.setattr(engine.batch._decoder, "step", wider)
    assert ids(generate(engine, PROMPTS, 3, PARAMS)) == expected
    assert (12, 16) in seen and all(rows <= padded < rows + 8 for rows, padded in seen)


def test_prefill_in_blocks_of_rows_is_exact(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rewardsmith.rollout.fast.attention._BLOCK", 5)
    model = adapted("gemma2")
    for prompt, group in zip(PROMPTS, generate(make_engine("torch", model), PROMPTS, 2, PARAMS), strict=True):
        assert max(largest_error(model, prompt, completion, 1.0) for completion in group) < 1e-4


def test_sampling_processes_do_without_transformers_and_peft():
    code = (
        "import sys, rewardsmith.rollout.fast.engine, rewardsmith.rollout.fast.native\n"
        "loaded = {'transformers', 'peft'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_whole_distribution_is_sampled():
    """4000 first tokens against the model's probabilities: 5 standard deviations."""
    model = adapted("qwen2")
    (group,) = generate(make_engine("native", model), [[5, 6]], 4000, SamplingParamsConfig(max_tokens=1))
    probs_V = whole_logps(model, [5, 6], [0], 1.0)[0].double().exp()
    counts_V = torch.bincount(torch.tensor([completion.ids[0] for completion in group]), minlength=VOCAB)
    deviation_V = (4000 * probs_V * (1 - probs_V)).sqrt()
    assert ((counts_V - 4000 * probs_V).abs() <= 5 * deviation_V + 1).all()
