"""Blocked weights: the same numbers as without them, and never those of weights that have changed since."""

from itertools import chain

import pytest
import torch
from engines import PROMPTS, adapted, generate, ids, make_engine

from rewardsmith.config import SamplingParamsConfig
from rewardsmith.rollout.fast import blocked
from rewardsmith.rollout.fast.blocked import Blocked
from rewardsmith.rollout.fast.engine import FastEngine

PARAMS = SamplingParamsConfig(max_tokens=24)
MANY = 8  # completions of each prompt: rows enough

pytestmark = pytest.mark.skipif(not blocked.HAS_ONEDNN, reason="this build of torch has no oneDNN")


@pytest.fixture
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "LEAST_BYTES", 0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many copies each batch had."""
    counts: list[int] = []
    drop = Blocked.drop

    def counted(self: Blocked) -> None:
        counts.append(len(self._copies))
        drop(self)

    monkeypatch.setattr(Blocked, "drop", counted)
    return counts


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", ["native", "torch"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
def test_they_compute_the_same(family: str, kind: str, merge: bool, made: list[int], monkeypatch: pytest.MonkeyPatch):
    model = adapted(family)
    plain = generate(make_engine(kind, model, merge=merge), PROMPTS, MANY, PARAMS)
    assert not any(made), "the tiny model is too small for them"
    monkeypatch.setattr(blocked, "LEAST_BYTES", 0)
    engine = make_engine(kind, model, merge=merge)
    copied = generate(engine, PROMPTS, MANY, PARAMS)
    assert max(made) == len(engine._weights.projections) + 1
    assert ids(copied) == ids(plain)
    for ours, theirs in zip(chain(*copied), chain(*plain), strict=True):
        torch.testing.assert_close(torch.tensor(ours.logps), torch.tensor(theirs.logps), rtol=0, atol=2e-5)


def test_they_are_dropped_when_a_batch_ends(small_ones_too: None):
    engine = make_engine("native", adapted("llama"))
    generate(engine, PROMPTS, MANY, PARAMS)
    assert not engine._decoder.blocked._copies


def test_few_rows_do_without(small_ones_too: None, made: list[int]):
    generate(make_engine("native", adapted("llama")), PROMPTS[:1], blocked.FEWEST_ROWS - 1, PARAMS)
    assert not any(made)


def test_no_copies_when_memory_is_short(small_ones_too: None, made: list[int], monkeypatch: pytest.MonkeyPatch):
    asked: list[torch.device] = []
    monkeypatch.setattr(blocked, "free_bytes", lambda device: asked.append(device) or 1000)
    engine = make_engine("native", adapted("llama"))
    generate(engine, PROMPTS, MANY, PARAMS)
    assert not any(made)
    assert len(asked) == 1, "once a batch, not for every token"
    monkeypatch.setattr(blocked, "free_bytes", lambda device: 10**9)
    generate(engine, PROMPTS, MANY, PARAMS)
    assert any(made), "the next batch may find more"


@pytest.mark.parametrize(("short", "copies"), [(0, True), (1, False)])
def test_copies_keep_to_a_given_limit_whatever_is_free(small_ones_too: None, made: list[int], short: int, copies: bool):
    engine = make_engine("native", adapted("llama"))
    wanted = sum(p.base_OI.nbytes for p in engine._weights.projections)
    wanted += engine._weights.head_VH[: engine.vocab].nbytes
    engine = make_engine("native", adapted("llama"), blocked_bytes=wanted - short)
    generate(engine, PROMPTS, MANY, PARAMS)
    assert any(made) == copies


def test_processes_that_share_memory_share_the_limit():
    assert [blocked.most_bytes(8000, processes) for processes in (1, 2, 8)] == [2000, 1000, 250]


def test_a_delivery_in_the_middle_of_a_batch_takes_effect(small_ones_too: None):
    engine = make_engine("native", adapted("llama"))
    before, after = (_log_probs(engine, change) for change in (False, True))
    assert before[:6] == pytest.approx(after[:6], abs=1e-6), "the first tokens come from the first adapter"
    assert max(abs(b - a) for b, a in zip(before[6:], after[6:], strict=False)) > 1e-3


def _log_probs(engine: FastEngine, change: bool) -> list[float]:
    """Of a completion's tokens; with a change, another adapter is delivered after its sixth."""
    steps = 0

    def deliver_another() -> None:
        nonlocal steps
        steps += 1
        if change and steps == 7:
            engine.load_adapter({name: 3 * tensor for name, tensor in engine._weights.adapter().items()}, 1)

    engine._between_tokens = deliver_another
    return generate(engine, PROMPTS[:1], 2 * blocked.FEWEST_ROWS, PARAMS)[0][0].logps
