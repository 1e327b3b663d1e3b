"""The fast path's gradient and log-probs against the plain path and against autograd alone, and its invariances."""

import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch
from fused_models import (
    BATCH,
    TEMPERATURE,
    VOCAB,
    batch,
    exact_gradient,
    fast_gradient,
    old_logps,
    policy,
    relative_difference,
)
from job_runs import config
from tiny_models import ALL_FAMILIES, FAMILIES

from rewardsmith.config import Loss
from rewardsmith.train.fast import attention, head
from rewardsmith.train.fast import gradient as fast
from rewardsmith.train.fast.memory import Budget
from rewardsmith.train.lora import POLICY, parameters
from rewardsmith.train.losses import LossSettings
from rewardsmith.train.plain import PlainPath

LOSSES = get_args(Loss)
CORRECTIONS = {
    "truncated": {"correction": "truncate", "correction_high": 1.5},
    "masked by sequence": {
        "correction": "mask",
        "correction_level": "sequence",
        "correction_low": 0.01,
        "correction_high": 50.0,
    },
}


def plain_gradient(model, examples, job, old=None):
    for parameter in parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    found = PlainPath(model, VOCAB).gradient(examples, job, old)
    named = model.named_parameters()
    return found, {name.replace(f".{POLICY}.", "."): p.grad for name, p in named if f".{POLICY}." in name}


def budget(weights, rows: int, recompute: bool = False) -> Budget:
    """Of a set size in place of what memory allows."""
    made = Budget()
    made.most, made.recompute = rows, recompute
    return made


def job(**changes):
    return config(sampling_params={"temperature": TEMPERATURE, "max_tokens": 12}, **changes)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_is_exact(family: str, merge: bool):
    settings = LossSettings(beta=0.1)
    _, weights = policy(family, merge=merge)
    found, gradients = fast_gradient(weights, batch(), settings)
    loss, expected, logps = exact_gradient(policy(family, merge=False)[1], batch(), settings)
    assert relative_difference(gradients, expected) < 1e-11
    assert abs(found.loss - loss) < 1e-11
    assert all(
        torch.allclose(ours, theirs, atol=1e-11, rtol=0) for ours, theirs in zip(found.logps, logps, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_against_peft(family: str, dtype: torch.dtype):
    model, weights = policy(family, dtype)
    found, gradients = fast_gradient(weights, batch(), LossSettings.of(job(beta=0.1)))
    plain, expected = plain_gradient(model, batch(), job(beta=0.1))
    assert relative_difference(gradients, expected) < (1e-6 if dtype == torch.float64 else 1e-5)
    assert found.loss == pytest.approx(plain.loss, rel=1e-5, abs=1e-5)
    assert found.kl == pytest.approx(plain.kl, rel=1e-5)
    assert (found.tokens, found.clipped_low, found.clipped_high) == (plain.tokens, 0, 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_against_peft(loss: str):
    model, weights = policy()
    changes = {"loss": loss} | ({"kl_estimator": "k2", "beta": 0.05} if loss != "sapo" else {})
    for old in (None, old_logps(batch())):
        found, gradients = fast_gradient(weights, batch(), LossSettings.of(job(**changes)), old)
        plain, expected = plain_gradient(model, batch(), job(**changes), old)
        assert relative_difference(gradients, expected) < 1e-6
        assert found.loss == pytest.approx(plain.loss, rel=1e-5)
        assert (found.clipped_low, found.clipped_high) == (plain.clipped_low, plain.clipped_high)
        assert found.tokens == plain.tokens == sum(sum(lengths) for _, lengths in BATCH)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("estimator", [None, "k1", "k2", "k3"])
def test_every_loss_and_kl_is_exact_on_and_off_policy(loss: str, estimator: str | None):
    settings = LossSettings(loss=loss, beta=0.1 if estimator else 0.0, kl_estimator=estimator or "k3", dual_clip=2.0)
    _, weights = policy(merge=False)
    for old in (None, old_logps(batch())):
        found, gradients = fast_gradient(weights, batch(), settings, old)
        loss_value, expected, _ = exact_gradient(weights, batch(), settings, old)
        assert relative_difference(gradients, expected) < 1e-11
        assert found.loss == pytest.approx(loss_value, rel=1e-11, abs=1e-11)
        assert (found.kl is None) == (estimator is None)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_correction_for_the_sampler_is_exact(correction: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(head.CHUNK_LOGITS, "cpu", 1)
    monkeypatch.setattr(head, "FEWEST_ROWS", 5)  # chunks that cut completions in two
    settings = LossSettings(**CORRECTIONS[correction])
    _, weights = policy(merge=False)
    _, gradients = fast_gradient(weights, batch(), settings)
    assert relative_difference(gradients, exact_gradient(weights, batch(), settings)[1]) < 1e-11
    without = fast_gradient(weights, batch(), LossSettings())[1]
    assert relative_difference(gradients, without) > 1e-2


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "down_proj"], ["o_proj"], ["up_proj"]])
@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_on_some_layers_only(targets: list[str], merge: bool):
    _, weights = policy(merge=merge, target_modules=targets)
    _, gradients = fast_gradient(weights, batch(), LossSettings())
    _, expected, _ = exact_gradient(policy(merge=False, target_modules=targets)[1], batch(), LossSettings())
    assert len(gradients) == 2 * 2 * len(targets)
    assert relative_difference(gradients, expected) < 1e-11


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_supports_are_normalised_over(family: str):
    settings = LossSettings(beta=0.1)
    _, weights = policy(family, merge=False)
    examples = batch(support=True)
    found, gradients = fast_gradient(weights, examples, settings)
    loss, expected, _ = exact_gradient(weights, examples, settings)
    assert relative_difference(gradients, expected) < 1e-11
    assert found.loss == pytest.approx(loss, rel=1e-11)
    assert relative_difference(gradients, fast_gradient(weights, batch(), settings)[1]) > 1e-2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_split_order_chunks_tiles_and_recomputing_change_nothing(
    family: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
):
    settings = LossSettings(loss="gspo", beta=0.1)
    _, weights = policy(family)
    examples, old = batch(), old_logps(batch())
    whole, expected = fast_gradient(weights, examples, settings, old)
    monkeypatch.setattr(head, "FEWEST_ROWS", 3)
    monkeypatch.setitem(head.CHUNK_LOGITS, "cpu", 1)
    monkeypatch.setattr(attention, "FEWEST_ROWS", 2)
    monkeypatch.setitem(attention.TILE_NUMBERS, "cpu", 400)
    monkeypatch.setitem(attention.TILE_COST, "cpu", 40)
    for rows, order in ((1, 1), (16, -1), (40, 1), (2048, -1)):
        found, gradients = fast_gradient(
            weights, examples[::order], settings, old[::order], budget(weights, rows, recompute)
        )
        assert relative_difference(gradients, expected) < 1e-12
        assert abs(found.loss - whole.loss) < 1e-12
        assert abs(found.kl - whole.kl) < 1e-10
        for ours, theirs in zip(found.logps[::order], whole.logps, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


def test_the_tokens_shared_by_a_group_add_up_their_gradients():
    """The last row of a prompt predicts the first token of every completion; there is nothing else to learn here."""
    _, weights = policy(merge=False)
    examples = batch([([5, 6, 7, 8], (1, 1, 1, 1))])
    _, gradients = fast_gradient(weights, examples, LossSettings())
    assert relative_difference(gradients, exact_gradient(weights, examples, LossSettings())[1]) < 1e-11
    one_by_one = [fast_gradient(weights, [example], LossSettings())[1] for example in examples]
    summed = {name: sum(part[name] for part in one_by_one) for name in gradients}
    assert relative_difference(gradients, summed) < 1e-12


def test_parts_of_a_batch_add_up_to_the_whole():
    """As ranks compute them, each a part, into gradients that hold something already."""
    settings = LossSettings(beta=0.1)
    _, weights = policy()
    examples = batch()
    whole, expected = fast_gradient(weights, examples, settings)
    gradients = {name: torch.zeros_like(tensor) for name, tensor in weights.adapter().items()}
    parts = []
    for part in (examples[:5], examples[5:6], [], examples[6:]):
        parts.append(
            fast.gradient(
                weights,
                part,
                settings,
                temperature=TEMPERATURE,
                vocab=VOCAB,
                gradients=gradients,
                budget=Budget(),
            )
        )
    assert relative_difference(gradients, expected) < 1e-12
    assert sum(part.loss for part in parts) == pytest.approx(whole.loss, rel=1e-12)
    assert sum(part.kl for part in parts) == pytest.approx(whole.kl, rel=1e-12)
    assert sum(part.tokens for part in parts) == whole.tokens


def test_examples_without_a_gradient_are_passed_over():
    _, weights = policy()
    examples = batch()
    examples[2] = replace(examples[2], advantage=0.0)
    examples[4] = replace(examples[4], weight=0.0)
    found, gradients = fast_gradient(weights, examples, LossSettings())
    assert [place for place, logps in enumerate(found.logps) if logps is None] == [2, 4]
    assert found.tokens == sum(sum(lengths) for _, lengths in BATCH) - 9 - 12
    _, alone = fast_gradient(weights, [e for i, e in enumerate(examples) if i not in (2, 4)], LossSettings())
    assert relative_difference(gradients, alone) < 1e-12
    found, gradients = fast_gradient(weights, [examples[2], examples[4]], LossSettings())
    assert (found.loss, found.kl, found.tokens, found.logps) == (0.0, None, 0, [None, None])
    assert not any(tensor.any() for tensor in gradients.values())
    assert fast_gradient(weights, [], LossSettings(beta=0.1))[0].kl == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_of_policy_and_reference(family: str):
    model, weights = policy(family, torch.float32)
    path = PlainPath(model, VOCAB)
    for ours, theirs in (
        (fast.logps(weights, batch(), TEMPERATURE, VOCAB, budget=Budget()), path.policy_logps(batch(), job())),
        (
            fast.logps(weights, batch(), TEMPERATURE, VOCAB, budget=budget(weights, 20), base=True),
            path.reference_logps(batch(), job()),
        ),
    ):
        assert len(ours) == len(batch())
        assert all(torch.allclose(a, b, atol=1e-5, rtol=0) for a, b in zip(ours, theirs, strict=True))


def test_the_base_gets_no_gradient_and_does_not_move():
    _, weights = policy()
    before = [projection.base_OI.clone() for projection in weights.projections]
    fast_gradient(weights, batch(), LossSettings(beta=0.1))
    for projection, base_OI in zip(weights.projections, before, strict=True):
        assert torch.equal(projection.base_OI, base_OI) and projection.base_OI.grad is None
    assert weights.embed_VH.grad is None


def test_it_repeats_bit_for_bit():
    _, weights = policy(dtype=torch.float32)
    one, other = (fast_gradient(weights, batch(), LossSettings(beta=0.1)) for _ in range(2))
    assert one[0].loss == other[0].loss
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_bfloat16_is_close_to_float32():
    """Not merged, as `bind` decides for 16 bits; the adapter stays in float32."""
    _, wide = policy(dtype=torch.float32)
    _, narrow = policy(dtype=torch.bfloat16, merge=False)
    assert all(tensor.dtype == torch.float32 for tensor in narrow.adapter().values())
    _, expected = fast_gradient(wide, batch(), LossSettings())
    found, gradients = fast_gradient(narrow, batch(), LossSettings())
    assert all(logps.dtype == torch.float32 for logps in found.logps)
    assert relative_difference(gradients, expected) < 0.1


@pytest.mark.slow
def test_a_rank_needs_neither_transformers_nor_peft():
    code = (
        "import sys\n"
        "for name in ('transformers', 'peft'): sys.modules[name] = None\n"
        "import rewardsmith.train.parallel.rank\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
