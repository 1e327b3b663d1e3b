"""The estimate before the start: shapes against real models, memory by hand, seconds against steps that are counted."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ALL_FAMILIES, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Qwen2Config

from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ModelError
from rewardsmith.rollout.fast import blocked
from rewardsmith.rollout.fast.blocked import Blocked
from rewardsmith.rollout.fast.cache import PAGE, Cache
from rewardsmith.rollout.fast.engine import SLOTS
from rewardsmith.rollout.model.architecture import describe
from rewardsmith.rollout.model.weights import Weights
from rewardsmith.rollout.sampling import completion_seed
from rewardsmith.train import lora
from rewardsmith.train.batch import Example
from rewardsmith.train.estimate import calibration
from rewardsmith.train.estimate.calibration import Load, Measured, Parts, endless_tokenizer, shallow_model
from rewardsmith.train.estimate.estimate import estimate
from rewardsmith.train.estimate.footprint import Memory, lay_out, need
from rewardsmith.train.fast import memory as update_memory
from rewardsmith.train.fast.head import CHUNK_LOGITS
from rewardsmith.train.fast.memory import Budget, bytes_per_row
from rewardsmith.train.learner import Learner
from rewardsmith.train.parallel.ranks import Ranks

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def config(**changes: Any) -> GRPOConfig:
    settings: dict[str, Any] = {
        "base_model": "a folder",
        "rank": 4,
        "lora_alpha": 8,
        "beta": 0.0,
        "train_steps": 10,
        "effective_batch_size": 16,
        "num_generations": 4,
        "sampling_params": {"max_tokens": 24},
    }
    return GRPOConfig(**settings | changes)


def model_config(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**SIZES | {"num_hidden_layers": 6} | changes)


def folder(path: Path, **changes: Any) -> str:
    """A model of which only the config is there."""
    model_config(**changes).save_pretrained(path)
    return str(path)


# ---- shapes and memory


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("targets", [None, ["o_proj", "down_proj"]])
def test_a_model_without_weights_has_the_shapes_of_the_real_one(family: str, targets: list[str] | None):
    model = random_model(family)
    run = config(target_modules=targets)
    shape = lay_out(model.config, run)
    assert shape.weights == sum(parameter.numel() for parameter in model.parameters())
    architecture = describe(model)
    assert 4 * shape.cache_numbers() * PAGE <= Cache(architecture, torch.zeros(1)).page_bytes
    weights = Weights.fuse(model, architecture)
    for recompute in (False, True):
        assert 4 * shape.row_numbers(recompute) == bytes_per_row(weights, recompute)
    policy = lora.attach(model, run, "")
    assert shape.adapter == sum(parameter.numel() for parameter in lora.parameters(policy))


def test_fewer_layers_leave_embedding_and_head():
    whole, few = lay_out(model_config(), config()), lay_out(model_config(num_hidden_layers=2), config())
    norms = 4 * (2 * 64 + 64 + 2 * 32)  # of four layers: not counted with the linear ones, nor the biases of q, k, v
    assert whole.with_layers(2).weights == few.weights + norms
    assert whole.with_layers(2).adapter == few.adapter


def test_memory_is_the_sum_of_what_is_kept():
    shape = lay_out(model_config(), config())
    load = Load(prompts=4, group=4, prompt_tokens=32, completion_tokens=24, longest=24)
    memory = need(shape, load, device=CPU, ranks=2, own=2**28, available=2**34)
    assert memory.parts == {
        "model": 4 * shape.weights,
        "merged copy": 4 * shape.linear,
        "adapter, optimizer": 4 * shape.adapter * 9,
        "processes": 2**28 + 60 * 2**20,
    }
    cache = 4 * (2 * 6 * 2 * 16) * (4 * 32 + 16 * 24)
    assert memory.generation == cache + 16 * 256 * 4 * 4
    rows = (4 * 32 + 16 * 24) // 2
    assert memory.micro_batch_tokens == rows
    assert memory.update == 2 * (rows * 4 * shape.row_numbers() + 3 * 4 * rows * 256)
    assert memory.fits


@pytest.mark.parametrize("prompt", [3, 40, 600])
@pytest.mark.parametrize("longest", [8, 300])
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("rows_kept", [10, 1100, 10**6])
def test_a_micro_batch_is_the_one_that_the_update_will_take(
    rows_kept: int, ranks: int, longest: int, prompt: int, monkeypatch: pytest.MonkeyPatch
):
    """Of every kind: as large as can be, cut by what is fast enough, by long prompts, by memory; layers kept or not."""
    model, run = random_model("qwen3"), config()
    shape, weights = lay_out(model.config, run), Weights.fuse(model, describe(model))
    monkeypatch.setattr(update_memory, "KEPT_BYTES", rows_kept * bytes_per_row(weights))
    load = Load(prompts=4096, group=4, prompt_tokens=prompt, completion_tokens=longest, longest=longest)
    kinds = set()
    for rows_free in (1, 50, 100, 500, 1000, 3000, 10**5):
        room = rows_free * ranks * bytes_per_row(weights) / update_memory.SHARE
        parts = sum(need(shape, load, device=CPU, ranks=ranks, own=0, available=2**40).parts.values())
        found = need(shape, load, device=CPU, ranks=ranks, own=0, available=parts + int(room))
        free = found.available - sum(found.parts.values())
        monkeypatch.setattr(update_memory, "free_bytes", lambda device, free=free: free)
        budget = Budget(ranks)
        alone = prompt + longest - 1
        rows = max(budget.rows(weights, prompt, alone), alone)
        logits = min(CHUNK_LOGITS["cpu"], rows * shape.vocab)
        assert found.micro_batch_tokens == rows
        assert found.update == ranks * (rows * bytes_per_row(weights, budget.recompute) + 3 * 4 * logits)
        kinds.add((budget.recompute, rows))
    assert {recompute for recompute, _ in kinds} == {False, True}
    assert len(kinds) >= 3


@pytest.mark.skipif(not blocked.HAS_ONEDNN, reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("ranks", [1, 4])
def test_blocked_weights_are_counted_where_ranks_make_them(ranks: int, monkeypatch: pytest.MonkeyPatch):
    model = random_model("qwen2")
    shape, weights = lay_out(model.config, config()), Weights.fuse(model, describe(model))
    load = Load(prompts=32, group=8, prompt_tokens=4, completion_tokens=4, longest=4)
    copies = 4 * (shape.linear + shape.vocab * shape.hidden)
    enough = ranks * copies / blocked.SHARE

    def memory(available: int, least: int) -> Memory:
        monkeypatch.setattr(blocked, "LEAST_BYTES", least)
        return need(shape, load, device=CPU, ranks=ranks, own=0, available=available)

    seen = set()
    kept = sum(memory(2**40, 0).parts.values())
    for tenths in range(20):
        found = memory(int(kept + enough * tenths / 10), 0)
        free = found.available - sum(found.parts.values())
        made = Blocked(weights, shape.vocab, blocked.most_bytes(max(0, free), ranks))
        made.make(64)
        counted = found.generation - memory(found.available, 2**30).generation
        assert counted == (ranks * copies if made._copies else 0), free / enough
        seen.add(bool(counted))
    assert seen == {False, True}


def test_a_gpu_draws_more_at_a_time():
    shape = lay_out(model_config(), config())
    load = Load(prompts=64, group=8, prompt_tokens=32, completion_tokens=24, longest=24)
    at_once = {}
    for device in ("cpu", "cuda"):
        memory = need(shape, load, device=torch.device(device), ranks=1, own=0, available=2**36)
        one = (2 if device == "cuda" else 4) * shape.cache_numbers()
        slots = at_once[device] = SLOTS[device]
        assert memory.generation == one * (slots // 8 * 32 + slots * 24) + 4 * slots * 256 * 4
    assert at_once["cuda"] > at_once["cpu"]


def test_half_precision_and_short_memory_keep_no_merged_copy():
    shape = lay_out(model_config(), config())
    load = Load(4, 4, 32, 24, 24)
    ample = need(shape, load, device=CPU, ranks=1, own=0, available=2**34)
    short = need(shape, load, device=CPU, ranks=1, own=0, available=6 * shape.weights)
    assert ample.parts["merged copy"] > 0
    assert short.parts["merged copy"] == 0
    on_gpu = need(shape, load, device=torch.device("cuda"), ranks=1, own=0, available=2**34)
    assert (on_gpu.parts["model"], on_gpu.parts["merged copy"]) == (2 * shape.weights, 0)


def test_the_plain_path_needs_more_for_logits_and_layers():
    shape, load = lay_out(model_config(), config()), Load(4, 4, 32, 24, 24)
    fast, plain = (need(shape, load, device=CPU, ranks=1, own=0, available=2**34, fast=fast) for fast in (True, False))
    assert plain.update > 2 * fast.update
    assert plain.generation > fast.generation, "the prompt once for each completion"


# ---- loads


def test_a_load_within_few_tokens_keeps_its_lengths_as_long_as_it_can():
    load = Load(prompts=8, group=8, prompt_tokens=80, completion_tokens=128, longest=128)
    assert load.packed_tokens == 8 * (80 + 8 * 128)
    assert load.within(1e9, 2) == load
    assert load.within(3000, 2) == Load(2, 8, 80, 128, 128)
    assert load.within(900, 2) == Load(1, 4, 80, 128, 128)
    assert load.within(60, 2) == Load(1, 4, 12, 12, 12)
    for tokens in (50, 100, 400, 2000, 5000):
        part = load.within(tokens, 2)
        assert part.packed_tokens <= tokens
        assert part.halved().packed_tokens < part.packed_tokens
        assert part.halved().completions >= 2, "each rank has work"
        assert part.completions % 4 == 0, "and as much as the others"


def test_equal_lengths_are_drawn_in_waves():
    assert Load(8, 8, 80, 128, 128).drawing_steps(64) == 128
    assert Load(16, 8, 80, 128, 128).drawing_steps(64) == 256


@pytest.mark.parametrize(("mean", "longest", "completions", "slots"), [(19, 96, 256, 64), (40, 128, 64, 64)])
def test_ragged_lengths_are_drawn_in_about_the_steps_that_a_simulation_takes(
    mean: int, longest: int, completions: int, slots: int
):
    chance = random.Random(0)

    def simulated() -> int:
        waiting = [min(longest, 1 + int(chance.expovariate(1 / (mean - 0.5)))) for _ in range(completions)]
        running, steps = [waiting.pop() for _ in range(slots)], 0
        while running:
            steps += 1
            running = [left - 1 for left in running if left > 1]
            while waiting and len(running) < slots:
                running.append(waiting.pop())
        return steps

    truth = sum(simulated() for _ in range(50)) / 50
    assert Load(completions // 8, 8, 80, mean, longest).drawing_steps(slots) == pytest.approx(truth, rel=0.15)


# ---- seconds


def test_parts_are_extrapolated_along_the_line_through_two_models():
    shallow, deep = Parts(1.0, 2.0, 3.0, 4.0, 6.0), Parts(1.5, 4.0, 3.0, 4.4, 8.0)
    found = deep.at(10, shallow, 3, 1)
    assert found == Parts(*map(pytest.approx, (3.25, 11.0, 3.0, 5.8, 15.0)))
    assert shallow.at(3, deep, 3, 1).next == 2.0, "noise: no layer takes less than nothing"
    assert deep.at(3, deep, 3, 3) is deep


def test_seconds_of_a_step_are_those_of_its_parts():
    parts = Parts(prompt_token=0.001, next=0.01, next_token=0.0001, update=0.5, deliver=0.05)
    load = Load(prompts=8, group=8, prompt_tokens=100, completion_tokens=50, longest=50)
    found = Measured(parts, "fast", [], ranks=2, at_a_time=32).seconds(load)
    assert found["generate"] == pytest.approx(800 * 0.001 + 2 * 50 * 0.01 + 3200 * 0.0001)
    assert (found["update"], found["deliver"]) == (0.5, 0.05)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_a_shallow_model_takes_the_same_path_and_draws_all_tokens_alike(family: str):
    whole = random_model(family, num_hidden_layers=4, **({"layer_types": None} if family == "gemma3" else {}))
    model = shallow_model(whole.config, 2, CPU)
    assert len(describe(model).layers) == 2
    assert len(getattr(model.config, "layer_types", None) or "ab") == 2
    assert whole.config.num_hidden_layers == 4, "the config it came from stays"
    vocab = model.config.vocab_size
    learner = Learner(model, endless_tokenizer(vocab), config())
    ((_, (completion, _)),) = learner.engine.generate([[3, 4, 5]], 2, config().sampling_params, [1, 2])
    assert (len(completion.ids), completion.finish_reason) == (24, "length")
    assert completion.logps == pytest.approx([-torch.tensor(vocab).log().item()] * 24)


class Operations(TorchDispatchMode):
    """Counts those of matrix products while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if operations := flop_registry.get(function._overloadpacket):
            self.count += operations(*args, **kwargs or {}, out_val=result)
        return result


def whole_step(run: GRPOConfig, load: Load) -> dict[str, int]:
    """Operations of generation and update of a real step of the whole model."""
    model = shallow_model(model_config(), 6, CPU)
    learner = Learner(model, endless_tokenizer(256), run, longest_prompt=load.prompt_tokens)
    prompts = [[(7 * i + n) % 256 for n in range(load.prompt_tokens)] for i in range(load.prompts)]
    seeds = [completion_seed(0, n) for n in range(load.completions)]
    with Operations() as generating:
        drawn = dict(learner.engine.generate(prompts, load.group, run.sampling_params, seeds))
    weight = 1 / (load.completions * load.completion_tokens)
    batch = [
        Example(prompts[i], completion.ids, (-1.0) ** n, weight, completion.logps)
        for i in range(load.prompts)
        for n, completion in enumerate(drawn[i])
    ]
    with Operations() as updating:
        learner.update(batch, 1, 2)
    return {"generate": generating.count, "update": updating.count}


@pytest.mark.parametrize(
    ("changes", "measured_at_once", "error"),
    [
        ({}, 1e9, 0.01),  # the whole load
        ({}, 1.2e8, 0.3),  # one group
        ({}, 6e7, 0.3),  # parts of completions
        ({"beta": 0.1, "updates_per_batch": 2}, 1e9, 0.01),
        ({"lora_dropout": 0.1}, 6e7, 0.3),
    ],
)
def test_two_shallow_models_tell_the_operations_of_a_whole_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], measured_at_once: float, error: float
):
    """With a clock that counts operations instead of time, on one thread: each measures as much as it can at once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(calibration.FLOPS, "cpu", measured_at_once)
    run = config(**changes)
    torch.set_num_threads(1)
    with Operations() as clock:
        found = estimate(folder(tmp_path), run, 40, start=Ranks, clock=lambda: clock.count)
    assert found.seconds is not None
    assert found.path.startswith("plain" if run.lora_dropout else "fast, 1 rank(s)")
    truth = whole_step(run, found.load)
    assert found.seconds["generate"] == pytest.approx(truth["generate"], rel=0.02)
    assert found.seconds["update"] == pytest.approx(truth["update"], rel=error)


def test_all_of_an_estimate_with_the_ranks_that_a_job_would_have(tmp_path: Path):
    source = folder(tmp_path)
    found = estimate(source, config(), 40, 12, start=lambda: Ranks(1))
    assert (found.ranks, found.threads, found.shape.layers) == (2, 1, 6)
    assert found.load == Load(4, 4, 40, 12, 24)
    assert found.path.startswith("fast, 2 rank(s) of 1 thread(s)")
    assert found.memory.fits and found.advice == []
    assert set(found.seconds) == {"generate", "update", "deliver"}
    assert found.per_step > 0
    assert found.total == pytest.approx(10 * found.per_step)


def test_epochs_leave_the_total_open(tmp_path: Path):
    found = estimate(folder(tmp_path, num_hidden_layers=1), config(train_steps=None, epochs=2), start=Ranks)
    assert found.per_step is not None
    assert found.total is None


# ---- what does not fit, what is not here


def test_a_model_that_fits_nowhere_is_told_so_and_not_timed(tmp_path: Path):
    sizes = {"hidden_size": 32768, "intermediate_size": 131072, "num_hidden_layers": 64, "vocab_size": 512}
    found = estimate(folder(tmp_path, **sizes), config())
    assert not found.memory.fits
    assert (found.seconds, found.per_step, found.total) == (None, None, None)
    assert found.unmeasured == "it does not fit"
    (advice,) = found.advice
    assert "no setting makes it fit" in advice and "billion parameters" in advice


def test_completions_that_are_too_long_are_told_what_length_fits(tmp_path: Path):
    source = folder(tmp_path, max_position_embeddings=2**40)
    run = config(sampling_params={"max_tokens": 10_000_000})
    found = estimate(source, run)
    assert not found.memory.fits
    (advice,) = [text for text in found.advice if text.startswith("sampling_params.max_tokens=")]
    tokens = int(advice.partition("=")[2])
    memory = found.memory
    for length, fits in ((tokens, True), (2 * tokens, False)):
        load = Load(4, 4, 256, length, length)
        again = need(found.shape, load, device=CPU, ranks=found.ranks, own=memory.parts["processes"],
                     available=memory.available)  # fmt: skip
        assert again.fits == fits or length > 5_000_000


def test_dropout_is_told_what_it_costs(tmp_path: Path):
    found = estimate(folder(tmp_path, num_hidden_layers=1), config(lora_dropout=0.1), 16, 4, start=Ranks)
    assert found.path == "plain"
    assert any("plain path" in notice for notice in found.notices)
    assert found.advice == ["lora_dropout=0 takes the fast path, which is several times faster"]


def test_a_prompt_that_fills_the_context_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="fills the model's context of 512"):
        estimate(folder(tmp_path), config(), 512)


@pytest.mark.parametrize("source", ["no-such/model", "empty"])
def test_a_model_whose_config_is_not_here_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is not on this machine") as raised:
        estimate(source, config())
    assert f"hf download {source} config.json" in raised.value.message


def test_what_is_no_language_model_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="'vit' models cannot be trained here"):
        estimate(str(tmp_path), config())
