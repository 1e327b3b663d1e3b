import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import CONTEXT, FAMILIES, WORDS, random_model, tokenizer
from tokenizers import decoders

from rewardsmith.config import SamplingParamsConfig
from rewardsmith.errors import DeliveryError, JobCanceled, ModelError
from rewardsmith.rollout.adapter import Fingerprint, adapter_tensors
from rewardsmith.rollout.engine import Completion
from rewardsmith.rollout.plain import PlainEngine, _cache_bytes_per_token
from rewardsmith.rollout.sampling import completion_seed

VOCAB, END = len(WORDS), 1
PROMPTS = [[5, 6, 7], [9], [12, 3, 3, 8, 20, 11, 4], [5, 6, 7]]


def adapted(family: str) -> PeftModel:
    """A model whose adapter does something."""
    model = get_peft_model(
        random_model(family), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), adapter_name="rollout"
    )
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_tensors(model, "rollout").values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def run(engine: PlainEngine, prompts, *asked) -> list[list[Completion]]:
    groups = dict(engine.generate(prompts, *asked))
    return [groups[i] for i in range(len(prompts))]


def seeds_for(count: int) -> list[int]:
    return [completion_seed(0, 1, i) for i in range(count)]


def whole_logps(model: PeftModel, prompt: list[int], ids: list[int], temperature: float) -> torch.Tensor:
    """Log-probs of `ids` from one forward over the whole text, no cache, no batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, :VOCAB]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8}], ids=lambda cut: "-".join(cut) or "full"
)
def test_log_probs_are_those_of_one_forward_over_the_whole_text(family: str, cut: dict):
    model = adapted(family)
    params = SamplingParamsConfig(temperature=0.8, max_tokens=20, **cut)
    groups = run(PlainEngine(model, tokenizer()), PROMPTS, 4, params, seeds_for(16))
    finished = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = whole_logps(model, prompt, completion.ids, 0.8)
            chosen = expected.gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
            assert (chosen - torch.tensor(completion.logps)).abs().max() < 1e-4
            assert max(completion.ids) < VOCAB  # nothing from the padded part of the vocabulary
            for row, token in zip(expected, completion.ids, strict=True):
                assert token in allowed(row.exp(), **cut)
            finished.add(completion.finish_reason)
    assert finished == {"stop", "length"}  # rows ended at different times, so rows were taken out of the batch


def allowed(probs: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> set[int]:
    """The support by definition, with room for rounding at the border of top-p."""
    order = probs.argsort(descending=True).tolist()[: top_k or None]
    total, mass, kept = float(probs[order].sum()), 0.0, set()
    for token in order:
        if mass >= top_p * total + 1e-5:
            break
        kept.add(token)
        mass += float(probs[token])
    return kept


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_does_not_depend_on_its_batch(family: str):
    engine = PlainEngine(adapted(family), tokenizer())
    params, seeds = SamplingParamsConfig(max_tokens=16), seeds_for(16)
    together = run(engine, PROMPTS, 4, params, seeds)
    alone = [run(engine, [prompt], 4, params, seeds[4 * i : 4 * i + 4])[0] for i, prompt in enumerate(PROMPTS)]
    backwards = run(engine, PROMPTS[::-1], 4, params, [s for i in (3, 2, 1, 0) for s in seeds[4 * i : 4 * i + 4]])
    assert ids(together) == ids(alone) == ids(backwards[::-1])
    assert together[0] != together[3]  # the same prompt with other seeds


def test_batches_that_exceed_the_cache_change_nothing(monkeypatch: pytest.MonkeyPatch):
    engine = PlainEngine(adapted("qwen2"), tokenizer())
    params, seeds = SamplingParamsConfig(max_tokens=12), seeds_for(16)
    expected = run(engine, PROMPTS, 4, params, seeds)
    monkeypatch.setattr("rewardsmith.rollout.plain.CACHE_BYTES", 1)
    assert ids(run(engine, PROMPTS, 4, params, seeds)) == ids(expected)


def test_a_group_larger_than_the_cache_is_sampled_in_parts(monkeypatch: pytest.MonkeyPatch):
    model = adapted("qwen2")
    engine = PlainEngine(model, tokenizer())
    params, seeds = SamplingParamsConfig(max_tokens=12), seeds_for(32)
    expected = run(engine, PROMPTS, 8, params, seeds)
    room = 3 * (3 + 12)  # three rows of the prompts with three tokens, two of the longest one
    monkeypatch.setattr("rewardsmith.rollout.plain.CACHE_BYTES", room * _cache_bytes_per_token(engine._config))
    rows: list[int] = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert ids(run(engine, PROMPTS, 8, params, seeds)) == ids(expected)
    assert max(rows) == 3


def test_the_cache_is_planned_by_what_fits_the_context(monkeypatch: pytest.MonkeyPatch):
    engine = PlainEngine(adapted("qwen2"), tokenizer())
    monkeypatch.setattr("rewardsmith.rollout.plain.CACHE_BYTES", 8 * CONTEXT * _cache_bytes_per_token(engine._config))
    assert list(engine._batches([[5], [6]], 4, 10**7)) == [([0, 1], range(4))]


def ids(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids for completion in group] for group in groups]


def test_each_prompt_is_read_once_and_finished_rows_leave_the_batch():
    model = adapted("qwen2")
    shapes: list[tuple[int, ...]] = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    run(PlainEngine(model, tokenizer()), PROMPTS, 16, SamplingParamsConfig(max_tokens=40), seeds_for(64))
    assert shapes[0] == (len(PROMPTS), 7)
    rows = [shape[0] for shape in shapes[1:]]
    assert rows[0] == 64 and rows == sorted(rows, reverse=True) and rows[-1] < 32
    assert {shape[1] for shape in shapes[1:]} == {1}


def test_text_leaves_out_the_end_of_turn_and_nothing_else():
    engine, words = PlainEngine(adapted("qwen2"), tokenizer()), tokenizer()
    groups = run(engine, [[5]], 64, SamplingParamsConfig(max_tokens=30), seeds_for(64))
    by_reason = {completion.finish_reason: completion for completion in groups[0]}
    stopped, cut = by_reason["stop"], by_reason["length"]
    assert stopped.ids[-1] == END and END not in stopped.ids[:-1]
    assert stopped.text == words.decode(stopped.ids[:-1])
    assert len(cut.ids) == 30 and END not in cut.ids and cut.text == words.decode(cut.ids)


def test_the_space_before_a_first_word_survives():
    words = tokenizer()
    words.backend_tokenizer.decoder = decoders.Metaspace(" ", prepend_scheme="always")
    assert words.decode([28, 2]) == "a"  # alone, the tokenizer drops it
    engine = PlainEngine(adapted("qwen2"), words)
    assert engine._text(5, [28, 2]) == " a"


def test_completions_end_at_the_models_context():
    long = [3] * (CONTEXT - 5)
    groups = run(PlainEngine(adapted("llama"), tokenizer()), 
        [long, [4]], 8, SamplingParamsConfig(max_tokens=50), seeds_for(16)
    )
    assert max(len(completion.ids) for completion in groups[0]) == 5
    assert max(len(completion.ids) for completion in groups[1]) > 5
    with pytest.raises(ModelError, match="fills the model's context"):
        run(PlainEngine(adapted("llama"), tokenizer()), 
            [[3] * CONTEXT], 2, SamplingParamsConfig(max_tokens=1), seeds_for(2)
        )


def test_logits_that_are_no_numbers_are_an_error():
    model = adapted("qwen2")
    next(iter(adapter_tensors(model, "rollout").values())).fill_(torch.nan)
    with pytest.raises(ModelError, match="not numbers"):
        run(PlainEngine(model, tokenizer()), [[5]], 2, SamplingParamsConfig(max_tokens=3), seeds_for(2))


def test_generation_can_be_ended_between_two_tokens():
    calls = []

    def between_tokens() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise JobCanceled("canceled")

    engine = PlainEngine(adapted("qwen2"), tokenizer(), between_tokens=between_tokens)
    with pytest.raises(JobCanceled):
        run(engine, [[5]], 8, SamplingParamsConfig(max_tokens=40), seeds_for(8))
    assert len(calls) == 3


def test_a_loaded_adapter_is_used_and_has_the_fingerprint_of_what_was_delivered():
    model = adapted("qwen2")
    engine = PlainEngine(model, tokenizer())
    params = SamplingParamsConfig(max_tokens=12)
    before = run(engine, [[5]], 8, params, seeds_for(8))
    delivered = {name: tensor * 3 for name, tensor in adapter_tensors(model, "rollout").items()}
    assert Fingerprint.of(delivered).difference(engine.fingerprint()).startswith(f"{len(delivered)} different")
    engine.load_adapter(delivered, version=4)
    assert engine.version == 4
    assert engine.fingerprint() == Fingerprint.of(delivered)
    assert run(engine, [[5]], 8, params, seeds_for(8)) != before


def test_an_adapter_of_another_shape_is_refused():
    engine = PlainEngine(adapted("qwen2"), tokenizer())
    good = {name: tensor.clone() for name, tensor in adapter_tensors(engine._model, "rollout").items()}
    first = next(iter(good))
    with pytest.raises(DeliveryError, match="1 names differ"):
        engine.load_adapter({name: tensor for name, tensor in good.items() if name != first}, 1)
    with pytest.raises(DeliveryError, match="another shape"):
        engine.load_adapter(good | {first: good[first][:1]}, 1)


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
