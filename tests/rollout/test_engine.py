"""What every engine has to do, on the plain one and the fast one with native code and without."""

from contextlib import closing
from itertools import chain

import pytest
import torch
from engines import (
    END,
    KINDS,
    PROMPTS,
    VOCAB,
    adapted,
    generate,
    ids,
    largest_error,
    make_engine,
    seeds_for,
    whole_logps,
)
from tiny_models import ALL_FAMILIES, CONTEXT, tokenizer
from tokenizers import decoders

from rewardsmith.config import SamplingParamsConfig
from rewardsmith.errors import DeliveryError, JobCanceled, ModelError
from rewardsmith.rollout.adapter import Fingerprint, adapter_tensors
from rewardsmith.rollout.engine import Completion, decoder, ends_in_stop, text_after, with_text

CUTS = [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8, "min_p": 0.1}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_log_probs_are_those_of_one_forward_over_the_whole_text(family: str, kind: str):
    model = adapted(family)
    groups = generate(make_engine(kind, model), PROMPTS, 4, SamplingParamsConfig(temperature=0.8, max_tokens=36))
    finished = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            assert largest_error(model, prompt, completion, 0.8) < 1e-4
            assert max(completion.ids) < VOCAB  # nothing from the padded part of the vocabulary
            assert completion.support is None
            finished.add(completion.finish_reason)
    assert finished == {"stop", "length"}  # sequences ended at different times


@pytest.mark.parametrize("kind", ["plain", "native"])
@pytest.mark.parametrize("cut", CUTS[1:], ids="-".join)
def test_a_cut_draw_stays_in_its_support_and_is_renormalised_over_it(kind: str, cut: dict):
    model = adapted("qwen2")
    groups = generate(make_engine(kind, model), PROMPTS, 4, SamplingParamsConfig(temperature=0.8, max_tokens=12, **cut))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            assert largest_error(model, prompt, completion, 0.8) < 1e-4
            assert completion.support is not None and len(completion.support) == len(completion.ids)
            expected = whole_logps(model, prompt, completion.ids, 0.8)
            for token, (row, chosen) in enumerate(zip(expected, completion.ids, strict=True)):
                support = set(completion.support[token].tolist())
                assert chosen in support
                assert allowed(row.exp(), -1e-5, **cut) <= support <= allowed(row.exp(), 1e-5, **cut)


def allowed(probs: torch.Tensor, room: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The support by definition, with room for rounding at the borders."""
    order = probs.argsort(descending=True).tolist()[: top_k or None]
    total, mass, kept = float(probs[order].sum()), 0.0, set()
    for token in order:
        if mass >= top_p * total + room or float(probs[token]) < min_p * float(probs[order[0]]) - room:
            break
        kept.add(token)
        mass += float(probs[token])
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [CUTS[0], CUTS[-1]], ids=["whole", "cut"])
def test_a_completion_does_not_depend_on_its_batch(kind: str, cut: dict):
    engine = make_engine(kind, adapted("llama"))
    params, seeds = SamplingParamsConfig(max_tokens=16, **cut), seeds_for(16)
    together = generate(engine, PROMPTS, 4, params)
    alone = [dict(engine.generate([p], 4, params, seeds[4 * i : 4 * i + 4]))[0] for i, p in enumerate(PROMPTS)]
    backwards = dict(
        engine.generate(PROMPTS[::-1], 4, params, [s for i in (3, 2, 1, 0) for s in seeds[4 * i : 4 * i + 4]])
    )
    assert ids(together) == ids(alone) == ids([backwards[3 - i] for i in range(4)])
    assert ids(together)[0] != ids(together)[3]  # the same prompt with other seeds


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(cut) or "whole")
def test_all_engines_draw_the_same_tokens(cut: dict):
    model = adapted("qwen2")
    params = SamplingParamsConfig(max_tokens=10, temperature=1.3, **cut)
    plain, native, twin = (ids(generate(make_engine(kind, model), PROMPTS, 4, params)) for kind in KINDS)
    assert plain == native == twin


@pytest.mark.parametrize("kind", KINDS)
def test_text_leaves_out_the_end_of_turn_and_nothing_else(kind: str):
    words = tokenizer()
    (group,) = generate(make_engine(kind, adapted("qwen2")), [[5]], 64, SamplingParamsConfig(max_tokens=30))
    by_reason = {completion.finish_reason: completion for completion in group}
    stopped, cut = by_reason["stop"], by_reason["length"]
    assert stopped.ids[-1] == END and END not in stopped.ids[:-1]
    assert stopped.text == words.decode(stopped.ids[:-1])
    assert len(cut.ids) == 30 and END not in cut.ids and cut.text == words.decode(cut.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_ends_a_completion_and_is_not_in_its_text(kind: str):
    engine, words, stop = make_engine(kind, adapted("qwen2")), tokenizer(), ["qj", "f", "absent"]
    free = generate(engine, PROMPTS, 8, SamplingParamsConfig(max_tokens=30))
    ended = generate(engine, PROMPTS, 8, SamplingParamsConfig(max_tokens=30, stop=stop))
    found = set()
    for before, after in zip(chain(*free), chain(*ended), strict=True):
        # The first token after which the text has a stop string, by definition.
        texts = [words.decode(before.ids[: n + 1]) for n in range(len(before.ids))]
        first = next((n for n, text in enumerate(texts) if any(s in text for s in stop)), None)
        if first is None:
            assert (after.ids, after.text, after.finish_reason) == (before.ids, before.text, before.finish_reason)
        else:
            assert after.ids == before.ids[: first + 1] and after.finish_reason == "stop"
            assert after.text == min((texts[first].partition(s)[0] for s in stop), key=len)
            found |= {s for s in stop if s in texts[first]}
    assert found == {"qj", "f"}  # the first of two tokens


@pytest.mark.parametrize("kind", KINDS)
def test_completions_end_at_the_models_context(kind: str):
    long = [3] * (CONTEXT - 5)
    engine = make_engine(kind, adapted("llama"))
    groups = generate(engine, [long, [4]], 8, SamplingParamsConfig(max_tokens=50))
    assert max(len(completion.ids) for completion in groups[0]) == 5
    assert max(len(completion.ids) for completion in groups[1]) > 5
    with pytest.raises(ModelError, match="fills the model's context"):
        generate(engine, [[4], [3] * CONTEXT], 2, SamplingParamsConfig(max_tokens=1))
    assert len(generate(engine, [[4]], 1, SamplingParamsConfig(max_tokens=1))[0][0].ids) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_no_numbers_are_an_error(kind: str):
    model = adapted("qwen2")
    next(iter(adapter_tensors(model, "rollout").values())).fill_(torch.nan)
    engine = make_engine(kind, model)
    for cut in CUTS[:2]:
        with pytest.raises(ModelError, match="not numbers"):
            generate(engine, [[5]], 2, SamplingParamsConfig(max_tokens=3, **cut))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_can_be_ended_between_two_tokens(kind: str):
    calls: list[int] = []

    def between_tokens() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise JobCanceled("canceled")

    engine = make_engine(kind, adapted("qwen2"), between_tokens=between_tokens)
    params = SamplingParamsConfig(max_tokens=40)
    with pytest.raises(JobCanceled):
        generate(engine, [[5]], 8, params)
    assert len(calls) == 3
    assert ids(generate(engine, [[5]], 2, params)) == ids(
        generate(make_engine(kind, adapted("qwen2")), [[5]], 2, params)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_generator_ends_the_rest_and_leaves_the_engine_usable(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rewardsmith.rollout.plain.CACHE_BYTES", 1)  # one sequence at a time
    calls: list[int] = []
    settings = {} if kind == "plain" else {"slots": 3}
    engine = make_engine(kind, adapted("qwen2"), between_tokens=lambda: calls.append(1), **settings)
    params = SamplingParamsConfig(max_tokens=20)
    expected = generate(engine, PROMPTS, 2, params)
    whole, calls[:] = len(calls), []
    with closing(engine.generate(PROMPTS, 2, params, seeds_for(8))) as groups:
        next(groups)
    assert len(calls) < 0.7 * whole
    assert ids(generate(engine, PROMPTS, 2, params)) == ids(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_adapter_is_used_and_has_the_fingerprint_of_what_was_delivered(kind: str):
    model = adapted("qwen2")
    engine = make_engine(kind, model)
    params = SamplingParamsConfig(max_tokens=12)
    before = generate(engine, [[5]], 8, params)
    delivered = {name: tensor * 3 for name, tensor in adapter_tensors(model, "rollout").items()}
    assert Fingerprint.of(delivered).difference(engine.fingerprint()).startswith(f"{len(delivered)} different")
    engine.load_adapter(delivered, version=4)
    assert engine.version == 4
    assert engine.fingerprint() == Fingerprint.of(delivered)
    after = generate(engine, [[5]], 8, params)
    assert ids(after) != ids(before)
    adapter_tensors(model, "rollout")  # the plain model with the same adapter is the measure
    for name, tensor in adapter_tensors(model, "rollout").items():
        tensor.copy_(delivered[name])
    assert max(largest_error(model, [5], completion, 1.0) for completion in after[0]) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_shape_is_refused(kind: str):
    model = adapted("qwen2")
    engine = make_engine(kind, model)
    good = {name: tensor.clone() for name, tensor in adapter_tensors(model, "rollout").items()}
    first = next(iter(good))
    with pytest.raises(DeliveryError, match="1 names differ"):
        engine.load_adapter({name: tensor for name, tensor in good.items() if name != first}, 1)
    with pytest.raises(DeliveryError, match="another shape"):
        engine.load_adapter(good | {first: good[first][:1]}, 1)


def test_the_space_before_a_first_word_survives():
    words = tokenizer()
    words.backend_tokenizer.decoder = decoders.Metaspace(" ", prepend_scheme="always")
    assert words.decode([28, 2]) == "a"  # alone, the tokenizer drops it
    assert text_after(decoder(words), 5, [28, 2]) == " a"
    completion = Completion([28, 2, END], [0.0] * 3, "stop")
    assert with_text(completion, [5], decoder(words), [END]).text == " a"


def test_text_ends_before_the_first_stop_string():
    decode = decoder(tokenizer())
    completion = Completion([2, 3, 4, 3, 4], [0.0] * 5, "stop")  # abcbc
    assert with_text(completion, [5], decode, [END], ["c", "bc"]).text == "a"
    assert with_text(completion, [5], decode, [END], ["x"]).text == "abcbc"


def test_stop_strings_are_found_across_tokens_and_only_when_whole():
    def decode(ids: list[int]) -> str:
        """Two characters a token; a tokenizer that drops a space in front."""
        return "".join(" x" if i == 9 else f"{i}{i}" for i in ids).removeprefix(" ")

    assert not ends_in_stop([1], 5, decode, ["12"])
    assert ends_in_stop([1, 2], 5, decode, ["12"])
    assert ends_in_stop([7] * 50 + [1, 2], 5, decode, ["zz", "1122"])
    assert not ends_in_stop([7] * 50 + [1, 2], 5, decode, ["111"])
    assert ends_in_stop([9], 5, decode, [" x"])  # the space is there after the prompt
    assert not ends_in_stop([1, 2], 5, decode, [])


def test_fingerprints_see_every_bit_and_name_what_differs():
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    print_ = Fingerprint.of(tensors)
    assert print_.difference(Fingerprint.of({k: v.clone() for k, v in tensors.items()})) == ""
    changed = {"a": torch.zeros(2, 3), "b": torch.tensor([1, 1, 1, 1 + 2**-23])}
    assert print_.difference(Fingerprint.of(changed)) == "1 different (first: b)"
    assert print_.difference(Fingerprint.of({"b": tensors["b"], "c": tensors["a"]})) == (
        "1 missing (first: a), 1 unknown (first: c)"
    )
    assert print_.difference(Fingerprint.of({"a": torch.zeros(3, 2), "b": tensors["b"]}))
    assert print_.digest != Fingerprint.of(changed).digest
