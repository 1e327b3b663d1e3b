"""The gradient of a whole update against an independent, obvious implementation, and its invariances."""

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch
from job_runs import config
from obvious_gradient import (
    LENGTHS,
    MAX_TOKENS,
    VOCAB,
    gradient,
    groups,
    job_of,
    ours,
    policy,
    relative_difference,
    straightforward,
    straightforward_logps,
    whole_batch,
)
from peft import PeftModel
from tiny_models import FAMILIES

from rewardsmith.config import Advantage, GRPOConfig, Loss
from rewardsmith.rollout.adapter import adapter_tensors
from rewardsmith.rollout.sampling import Support
from rewardsmith.train import plain
from rewardsmith.train.batch import Gradient
from rewardsmith.train.lora import POLICY
from rewardsmith.train.plain import PlainPath
from rewardsmith.train.samples import examples, with_advantages
from rewardsmith.train.update import make_optimizer


@torch.no_grad()
def move(model: PeftModel) -> None:
    """The policy a step further, far enough for ratios on both sides of the bounds."""
    generator = torch.Generator().manual_seed(4)
    for tensor in adapter_tensors(model, POLICY).values():
        tensor += torch.randn(tensor.shape, generator=generator) * 0.05


def check(job: GRPOConfig, model: PeftModel, clips: bool = True) -> None:
    """The first update on a batch and a later one."""
    with torch.no_grad():
        old = straightforward_logps(model, job)
    expected_loss, expected = straightforward(model, job)
    found, actual = ours(model, job)
    assert relative_difference(actual, expected) < 1e-6
    assert abs(found.loss - expected_loss) < 1e-9 + 1e-6 * abs(expected_loss)
    assert (found.clipped_low, found.clipped_high) == (0, 0)
    move(model)
    expected_loss, expected = straightforward(model, job, old)
    later, actual = ours(model, job, found.logps)
    assert relative_difference(actual, expected) < 1e-6
    assert abs(later.loss - expected_loss) < 1e-9 + 1e-6 * abs(expected_loss)
    assert float(sum(grad.norm() for grad in actual.values())) > 0
    if clips and job.loss not in ("sapo", "cispo"):
        assert later.clipped_low > 0 and later.clipped_high > 0


@pytest.mark.parametrize(("loss", "beta"), list(itertools.product(get_args(Loss), (0.0, 0.1))))
def test_the_gradient_is_that_of_the_obvious_implementation(loss: str, beta: float):
    # gspo's own bounds would clip every completion here and leave no gradient.
    bounds = {"clip_low": 0.03, "clip_high": 0.04} if loss == "gspo" else {}
    check(job_of(loss=loss, beta=beta, **bounds), policy())


@pytest.mark.parametrize("advantage", get_args(Advantage))
def test_every_advantage(advantage: str):
    check(job_of(advantage=advantage), policy())


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_other_estimators_of_the_kl(estimator: str):
    check(job_of(beta=0.2, kl_estimator=estimator), policy())


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_sampler_corrections(mode: str, level: str):
    check(job_of(loss="grpo", sampler_correction={"mode": mode, "level": level}), policy())
    if level == "sequence":
        correction = {"mode": mode, "level": level}
        check(job_of(loss="gspo", clip_low=0.9, clip_high=9, sampler_correction=correction), policy(), clips=False)


def test_dual_clip_and_bounds_of_ones_own():
    check(job_of(loss="grpo", clip_low=0.05, clip_high=0.1, dual_clip=1.2, updates_per_batch=2), policy())


@pytest.mark.parametrize("family", FAMILIES)
def test_both_families_with_kl(family: str):
    check(config(beta=0.05, sampling_params={"temperature": 1.3, "max_tokens": MAX_TOKENS}), policy(family))


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["dapo", "gspo"])
def test_micro_batches_order_and_padding_change_nothing(loss: str, beta: float, monkeypatch: pytest.MonkeyPatch):
    correction = {"mode": "truncate", "level": "sequence"}
    job = config(beta=beta, loss=loss, clip_low=0.03, clip_high=0.04, sampler_correction=correction)
    model = policy()
    old = ours(model, job)[0].logps
    move(model)
    found, whole = ours(model, job, old)
    batch = whole_batch(job)
    for limit, order in ((1, 1), (20, -1), (40, 1)):
        monkeypatch.setattr(plain, "MICRO_BATCH_TOKENS", limit)
        make_optimizer(model, job.optimizer, 1e-3)
        again = PlainPath(model, VOCAB).gradient(batch[::order], job, old[::order])
        assert relative_difference(gradient(model), whole) < 1e-9
        assert abs(again.loss - found.loss) < 1e-12
        assert (again.clipped_low, again.clipped_high, again.tokens) == (
            found.clipped_low,
            found.clipped_high,
            found.tokens,
        )
        for one, other in zip(again.logps[::order], found.logps, strict=True):
            assert (one is None) == (other is None) and (one is None or torch.allclose(one, other))


def test_splitting_by_tokens_really_splits(monkeypatch: pytest.MonkeyPatch):
    batch = whole_batch(config())
    split = {}
    for limit in (1, 40, 10_000):
        monkeypatch.setattr(plain, "MICRO_BATCH_TOKENS", limit)
        parts = list(plain.micro_batches(batch, range(len(batch)), VOCAB, torch.device("cpu")))
        assert sum(len(part.targets_N) for part in parts) == sum(map(sum, LENGTHS))
        assert sorted(row for part in parts for row in part.rows) == list(range(len(batch)))
        split[limit] = len(parts)
    assert split[1] == len(batch) > split[40] > split[10_000] == 1


@pytest.mark.parametrize(("advantage", "computed"), [("group_std", 5), ("reinforce_pp", 9)])
def test_without_kl_only_completions_with_an_advantage_are_computed(advantage: str, computed: int):
    """By group three of the first and two of the second; against the whole batch all that have a total."""
    model, job = policy(), config(advantage=advantage)
    rows = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found, _ = ours(model, job)
    assert sum(rows) == computed == sum(logps is not None for logps in found.logps)
    assert found.tokens == sum(len(logps) for logps in found.logps if logps is not None)


def test_log_probs_come_back_in_the_order_of_the_examples():
    model, job = policy(), config(beta=0.1)
    found, _ = ours(model, job)
    with torch.no_grad():
        expected = straightforward_logps(model, job)
    counted = [sample.total is not None for group in groups() for sample in group]
    for logps, own, counts in zip(found.logps, expected, counted, strict=True):
        assert torch.allclose(logps, own) if counts else logps is None
    assert found.kl > 0
    for one, other in zip(PlainPath(model, VOCAB).policy_logps(whole_batch(job), job), expected, strict=True):
        assert torch.allclose(one, other)


def test_a_batch_without_signal_or_without_totals_has_a_zero_gradient():
    job, model = config(), policy()
    make_optimizer(model, job.optimizer, 1e-3)
    path = PlainPath(model, VOCAB)
    without_signal = [[sample for sample in groups()[2]]]
    batch = examples(with_advantages(without_signal, job, MAX_TOKENS), job, MAX_TOKENS)
    assert path.gradient(batch, job) == Gradient(0.0, None, 0, 0, 0, [None] * 3)
    assert path.gradient([], config(beta=0.1)) == Gradient(0.0, 0.0, 0, 0, 0, [])
    assert all(not grad.any() for grad in gradient(model).values())


def test_a_gradient_adds_to_what_is_there():
    model, job = policy(), config(loss="grpo")
    _, once = ours(model, job)
    PlainPath(model, VOCAB).gradient(whole_batch(job), job)
    assert relative_difference(gradient(model), {name: 2 * grad for name, grad in once.items()}) < 1e-12


def test_a_support_is_what_log_probs_are_normalised_over():
    model, job = policy(), job_of(beta=0.1)
    generator = torch.Generator().manual_seed(5)
    drawn, kept = [], []
    for group in groups():
        drawn.append([])
        for sample in group:
            others = [torch.randperm(VOCAB, generator=generator)[:n] for n in range(1, len(sample.completion.ids) + 1)]
            ids = [
                torch.cat([torch.tensor([token]), other[other != token]])
                for token, other in zip(sample.completion.ids, others, strict=True)
            ]
            kept += ids
            completion = replace(sample.completion, support=Support.of(ids))
            drawn[-1].append(replace(sample, completion=completion))
    batch = examples(with_advantages(drawn, job, MAX_TOKENS), job, MAX_TOKENS)
    path = PlainPath(model, VOCAB)

    class Masked(torch.nn.Module):
        """The same model with logits of minus infinity wherever a draw could not choose."""

        def forward(self, ids: torch.Tensor, prompt: int, supports: list[torch.Tensor]) -> torch.Tensor:
            logits = model(input_ids=ids[None]).logits[0, prompt - 1 : -1]
            mask = torch.full_like(logits, -torch.inf)
            for position, ids_S in enumerate(supports):
                mask[position, ids_S] = 0
            return ((logits + mask) / 0.9).log_softmax(-1)

    masked, place = Masked(), 0
    with torch.no_grad():
        logps = path.policy_logps(batch, job)
        references = path.reference_logps(batch, job)
        model.set_adapter(POLICY)
        for example, own, reference in zip(batch, logps, references, strict=True):
            ids, count = torch.tensor(example.prompt + example.completion), len(example.completion)
            arguments = ids, len(example.prompt), kept[place : place + count]
            targets = torch.tensor(example.completion)[:, None]
            assert torch.allclose(masked(*arguments).gather(1, targets)[:, 0], own)
            with model.disable_adapter():
                assert torch.allclose(masked(*arguments).gather(1, targets)[:, 0], reference)
            place += count
    make_optimizer(model, job.optimizer, 1e-3)
    found = path.gradient(batch, job)
    assert all(torch.allclose(one, own) for one, own in zip(found.logps, logps, strict=True) if one is not None)
