"""The gradient of a whole update against an independent, obvious implementation, and its invariances."""

import itertools
import math
from dataclasses import replace
from functools import cache
from typing import get_args

import pytest
import torch
from job_runs import config
from peft import PeftModel
from tiny_models import FAMILIES, WORDS, random_model

from rewardsmith.config import GRPOConfig
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rollout.adapter import adapter_tensors
from rewardsmith.rollout.engine import Completion
from rewardsmith.rollout.prompts import Prompt
from rewardsmith.rollout.sampling import Support
from rewardsmith.train import plain
from rewardsmith.train.batch import Example, Gradient
from rewardsmith.train.grpo import Advantage, Loss
from rewardsmith.train.lora import POLICY, attach, parameters
from rewardsmith.train.plain import PlainPath
from rewardsmith.train.samples import Sample, examples, shaped_totals, with_advantages
from rewardsmith.train.update import make_optimizer, rate_factor, update

VOCAB, MAX_TOKENS = len(WORDS), 12
PROMPTS = [[5, 6, 7], [9], [12, 3, 3, 8, 20], [4, 4]]
# Ragged, with one-token completions; None has no total; the third group has no signal, the last one has one total.
LENGTHS = [[1, 4, 9], [12, 1, 1], [3, 2, 5], [2, 2, 7]]
TOTALS = [[0.0, 1.0, 0.25], [2.0, None, -1.0], [0.5, 0.5, 0.5], [None, 1.0, None]]
CUT_OFF = {(0, 2), (1, 0), (2, 1)}  # completions that ended for want of room


def policy(family: str = "qwen2", **changes) -> PeftModel:
    """A float64 model whose policy is not its reference."""
    model = attach(random_model(family).double(), config(**changes), "base")
    generator = torch.Generator().manual_seed(2)
    for tensor in adapter_tensors(model, POLICY).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    assert all(parameter.dtype == torch.float64 for parameter in parameters(model))
    return model


def job_of(**fields) -> GRPOConfig:
    return config(sampling_params={"temperature": 0.9, "max_tokens": MAX_TOKENS}, **fields)


def completion_ids() -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths] for lengths in LENGTHS
    ]


@cache
def sampler_logps() -> list[list[list[float]]]:
    """Of a sampler that is about the policy, but not quite."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        flat = iter(straightforward_logps(policy(), job_of()))
    return [[(next(flat) + 0.3 * torch.randn(n, generator=generator)).tolist() for n in row] for row in LENGTHS]


def groups() -> list[list[Sample]]:
    made = []
    drawn = zip(PROMPTS, completion_ids(), sampler_logps(), TOTALS, strict=True)
    for row, (prompt, ids_of_group, logps_of_group, totals) in enumerate(drawn):
        group = []
        for number, (ids, logps, total) in enumerate(zip(ids_of_group, logps_of_group, totals, strict=True)):
            reason = "length" if (row, number) in CUT_OFF else "stop"
            completion = Completion(ids, logps, reason, "")
            group.append(Sample(Prompt(row, "", prompt, {}), number, completion, {"f": Score("ok", total, 0)}, total))
        made.append(group)
    return made


def straightforward_logps(model: PeftModel, job: GRPOConfig) -> list[torch.Tensor]:
    """One whole forward per completion."""
    found = []
    for prompt, group in zip(PROMPTS, completion_ids(), strict=True):
        for ids in group:
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, :, :VOCAB]
            all_logps = (logits / job.sampling_params.temperature).log_softmax(-1)
            found.append(torch.stack([all_logps[len(prompt) - 1 + t, token] for t, token in enumerate(ids)]))
    return found


def straightforward_advantage(totals: list[list[float | None]], g: int, total: float, kind: str) -> float:
    group = torch.tensor([t for t in totals[g] if t is not None], dtype=torch.float64)
    everyone = torch.tensor([t for row in totals for t in row if t is not None], dtype=torch.float64)
    if kind == "reinforce_pp":
        return float((total - everyone.mean()) / (everyone.std() + 1e-6))
    if len(group) < 2 or group.max() == group.min():
        return 0.0
    if kind == "rloo":
        return float(total - (group.sum() - total) / (len(group) - 1))
    known = [torch.tensor([t for t in row if t is not None], dtype=torch.float64) for row in totals]
    centred = torch.cat([row - row.mean() for row in known])
    spread = {
        "group_std": group.std(),
        "group_mean": 1 - 1e-6,
        "batch_std": everyone.std(),
        "reinforce_pp_baseline": centred.std(),
    }
    return float((total - group.mean()) / (spread[kind] + 1e-6))


def straightforward(
    model: PeftModel, job: GRPOConfig, old_logps: list[torch.Tensor] | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient with formulas written out per completion, as the papers have them."""
    model.set_adapter(POLICY)
    own_logps = straightforward_logps(model, job)
    with torch.no_grad(), model.disable_adapter():
        references = straightforward_logps(model, job)
    low, high = {"dapo": (0.2, 0.28), "cispo": (None, 4.0)}.get(job.loss, (0.2, 0.2))
    low, high = job.clip_low or low, job.clip_high or high
    correction = job.sampler_correction
    samples = [(g, sample) for g, group in enumerate(groups()) for sample in group]
    losses = []
    for i, (g, sample) in enumerate(samples):
        if sample.total is None:
            continue
        a = straightforward_advantage(TOTALS, g, sample.total, job.advantage)
        own, length = own_logps[i], len(sample.completion.ids)
        old = own.detach() if old_logps is None else old_logps[i]
        ratio = (own - old).exp()
        if job.loss == "gspo":
            ratio = (own - old).mean().exp().expand(length)
        if job.loss == "cispo":
            per_token = -ratio.detach().clamp(max=1 + high) * a * own
        elif job.loss == "sapo":
            tau = 1.0 if a > 0 else 1.05
            per_token = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a
        else:
            per_token = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
            if job.dual_clip and a < 0:
                per_token = per_token.clamp(max=-job.dual_clip * a)
        if correction.mode:
            mu = torch.tensor(sample.completion.logps, dtype=torch.float64)
            w = (old.detach() - mu).exp()
            w = w.prod().expand(length) if correction.level == "sequence" else w
            kept = (w >= 0.5) & (w <= 2)
            per_token = per_token * (w.clamp(max=2) if correction.mode == "truncate" else w * kept)
        if job.beta:
            log_x = references[i] - own
            kl = {"k1": -log_x, "k2": log_x**2 / 2, "k3": log_x.exp() - 1 - log_x}[job.kl_estimator or "k3"]
            per_token = per_token + job.beta * kl
        losses.append(per_token)
    tokens = sum(len(loss) for loss in losses)
    if job.loss in ("grpo", "gspo", "sapo"):
        loss = sum(loss.mean() for loss in losses) / len(losses)
    elif job.loss == "dr_grpo":
        loss = sum(loss.sum() for loss in losses) / (len(losses) * MAX_TOKENS)
    else:
        loss = sum(loss.sum() for loss in losses) / tokens
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), gradient(model)


def gradient(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if f".{POLICY}." in name}


def whole_batch(job: GRPOConfig) -> list[Example]:
    return examples(with_advantages(groups(), job, MAX_TOKENS), job, MAX_TOKENS)


def ours(
    model: PeftModel, job: GRPOConfig, old_logps: list[torch.Tensor | None] | None = None
) -> tuple[Gradient, dict[str, torch.Tensor]]:
    make_optimizer(model, job.optimizer, 1e-3)
    found = PlainPath(model, VOCAB).gradient(whole_batch(job), job, old_logps)
    return found, gradient(model)


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


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    a, b = (torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (one, other))
    return float((a - b).norm() / b.norm())


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


# ---- what becomes of totals and lengths -----------------------------------------------------------------------------


def test_filtered_completions_are_as_if_they_had_not_been_drawn_for_the_loss():
    job = config(loss="grpo", overlong="filter", advantage="group_mean")
    weights = [example.weight for example in whole_batch(job)]
    totals = [total for group in TOTALS for total in group]
    counted = [total is not None and divmod(i, 3) not in CUT_OFF for i, total in enumerate(totals)]
    lengths = [length for group in LENGTHS for length in group]
    expected = [c / (sum(counted) * length) for c, length in zip(counted, lengths, strict=True)]
    assert weights == pytest.approx(expected)
    # Their totals still count in the group's mean: a cut off answer is an answer that was worth this much.
    assert whole_batch(job)[0].advantage == pytest.approx(0 - 1.25 / 3)


def test_long_completions_are_punished_before_advantages_and_totals_stay():
    job = config(overlong="punish", overlong_buffer=4, sampling_params={"max_tokens": MAX_TOKENS})
    drawn = groups()
    # Lengths 1, 4, 9 (cut off); 12 (cut off), 1, 1; 3, 2 (cut off), 5; 2, 2, 7: up to 8 tokens are free.
    nan = math.nan
    expected = [[0, 1, -0.75], [1, nan, -1], [0.5, -0.5, 0.5], [nan, 1, nan]]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert torch.allclose(shaped_totals(drawn, job, MAX_TOKENS), expected, equal_nan=True)
    with_all = with_advantages(drawn, job, MAX_TOKENS)
    assert [sample.total for group in with_all for sample in group] == [t for row in TOTALS for t in row]
    assert with_all[2][1].advantage < 0 < with_all[2][0].advantage  # equal totals, one of them cut off
    default = config(overlong="punish", sampling_params={"max_tokens": MAX_TOKENS})  # the last 2 of 12
    assert shaped_totals(drawn, default, MAX_TOKENS)[0].tolist() == [0, 1, -0.75]


def test_the_kl_in_the_reward_is_the_samplers_to_the_reference():
    job, model = config(beta=0.1, kl_in="reward"), policy()
    drawn = groups()
    path = PlainPath(model, VOCAB)
    references = path.reference_logps(examples(drawn, job, MAX_TOKENS), job)
    with torch.no_grad(), model.disable_adapter():
        expected = straightforward_logps(model, job)
    assert all(torch.allclose(one, other) for one, other in zip(references, expected, strict=True))
    shaped = shaped_totals(drawn, job, MAX_TOKENS, references)
    samples = [sample for group in drawn for sample in group]
    for i, (sample, reference) in enumerate(zip(samples, expected, strict=True)):
        if sample.total is not None:
            kl = sum(sample.completion.logps) - float(reference.sum())
            assert float(shaped.flatten()[i]) == pytest.approx(sample.total - 0.1 * kl)
    assert shaped.isnan().sum() == 3
    # Nothing of it is left in the loss: no reference pass, and what has no advantage is passed over.
    batch = examples(with_advantages(drawn, job, MAX_TOKENS, references), job, MAX_TOKENS)
    make_optimizer(model, job.optimizer, 1e-3)
    found = path.gradient(batch, job)
    assert found.kl is None and sum(logps is not None for logps in found.logps) == 8
    with pytest.raises(AssertionError):
        with_advantages(drawn, job, MAX_TOKENS)


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


# ---- the optimizer's part -------------------------------------------------------------------------------------------


def test_the_base_and_the_engines_adapter_get_no_gradient_and_do_not_move():
    job, model = config(beta=0.1), policy()
    before = {name: p.clone() for name, p in model.named_parameters() if f".{POLICY}." not in name}
    optimizer = make_optimizer(model, job.optimizer, 1e-2)
    update(model, optimizer, whole_batch(job), job, PlainPath(model, VOCAB), step=1, total_steps=10)
    for name, parameter in model.named_parameters():
        if f".{POLICY}." not in name:
            assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_dropout_acts_on_the_adapter_and_is_the_same_in_a_repeated_step():
    job, model = config(lora_dropout=0.5, learning_rate=1e-12), policy(lora_dropout=0.5)
    optimizer = make_optimizer(model, job.optimizer, 1e-12)
    path, batch = PlainPath(model, VOCAB), whole_batch(job)
    norms = [update(model, optimizer, batch, job, path, step=step, total_steps=10).grad_norm for step in (1, 1, 2)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] != pytest.approx(norms[2], rel=1e-3)


def test_the_gradient_is_clipped():
    job, model = config(max_grad_norm=1e-3), policy()
    optimizer = make_optimizer(model, job.optimizer, 1e-3)
    result = update(model, optimizer, whole_batch(job), job, PlainPath(model, VOCAB), step=1, total_steps=4)
    clipped = torch.cat([grad.flatten() for grad in gradient(model).values()]).norm()
    assert result.grad_norm > 1e-2 and clipped == pytest.approx(1e-3, rel=1e-4)


class Recording:
    """The plain path, and what it was given and gave."""

    def __init__(self, model: PeftModel) -> None:
        self.path = PlainPath(model, VOCAB)
        self.given: list[list[torch.Tensor | None] | None] = []
        self.found: list[Gradient] = []

    def gradient(self, examples, config, old_logps) -> Gradient:
        self.given.append(old_logps)
        self.found.append(self.path.gradient(examples, config, old_logps))
        return self.found[-1]


def test_several_updates_learn_from_one_batch_with_the_log_probs_of_the_first():
    job, model = config(updates_per_batch=3, learning_rate=0.05), policy()
    optimizer = make_optimizer(model, job.optimizer, 0.05)
    path, between = Recording(model), []
    result = update(
        model,
        optimizer,
        whole_batch(job),
        job,
        path,
        step=1,
        total_steps=1,
        between_updates=lambda: between.append(len(path.found)),
    )
    assert between == [1, 2]
    assert path.given == [None, path.found[0].logps, path.found[0].logps]
    assert optimizer.state_dict()["state"][0]["step"] == 3
    first, second, third = path.found
    assert (first.clipped_low, first.clipped_high) == (0, 0)
    assert not torch.equal(first.logps[0], second.logps[0])
    assert second.loss != first.loss
    assert result.loss == pytest.approx((first.loss + second.loss + third.loss) / 3)
    clipped = sum(found.clipped_low + found.clipped_high for found in path.found)
    assert clipped > 0
    assert result.clipped_low + result.clipped_high == pytest.approx(clipped / (3 * first.tokens))


def test_one_update_of_several_is_what_one_alone_would_be():
    """The first is the same; the later ones are those of an update with the old log-probs given."""
    one, several = config(learning_rate=0.01), config(learning_rate=0.01, updates_per_batch=2)
    results = []
    for job in (one, several):
        model = policy()
        update(
            model,
            make_optimizer(model, job.optimizer, 0.01),
            whole_batch(job),
            job,
            PlainPath(model, VOCAB),
            step=1,
            total_steps=1,
        )
        results.append(model)
    by_hand = policy()
    optimizer = make_optimizer(by_hand, one.optimizer, 0.01)
    path, old = PlainPath(by_hand, VOCAB), None
    for number in range(2):
        optimizer.zero_grad(set_to_none=False)
        found = path.gradient(whole_batch(one), one, old)
        old = old or found.logps
        torch.nn.utils.clip_grad_norm_(parameters(by_hand), one.max_grad_norm)
        optimizer.step()
        reached = results[number]
        assert all(torch.equal(a, b) for a, b in zip(parameters(by_hand), parameters(reached), strict=True))


def test_dropout_is_the_same_in_all_updates_on_a_batch():
    """With weights that stand still the ratio is 1, so nothing but the masks could move the loss."""
    job, model = config(lora_dropout=0.5, updates_per_batch=2, learning_rate=1e-30), policy(lora_dropout=0.5)
    path = Recording(model)
    update(model, make_optimizer(model, job.optimizer, 1e-30), whole_batch(job), job, path, step=1, total_steps=1)
    first, second = path.found
    assert first.loss == pytest.approx(second.loss, rel=1e-9)
    assert all(torch.allclose(a, b) for a, b in zip(first.logps, second.logps, strict=True) if a is not None)


def test_parts_of_a_batch_add_up():
    one, other = torch.zeros(2), torch.ones(3)
    total = Gradient.total([Gradient(1.0, 0.5, 1, 2, 3, [one, None]), Gradient(2.0, 0.25, 10, 20, 30, [other])])
    assert (total.loss, total.kl, total.clipped_low, total.clipped_high, total.tokens) == (3.0, 0.75, 11, 22, 33)
    assert total.logps[0] is one and total.logps[1] is None and total.logps[2] is other
    assert Gradient.total([Gradient(1.0, None, 0, 0, 1, [])]).kl is None


def test_learning_rates_by_hand():
    def rates(**scheduler) -> list[float]:
        job = config(lr_scheduler=scheduler, warmup_ratio=0.2)
        return [round(rate_factor(job.lr_scheduler, job.warmup_ratio, step, 10), 4) for step in range(1, 11)]

    assert rates(type="linear") == [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates(type="constant") == [1] * 10
    assert rates(type="constant_with_warmup") == [0.5] + [1] * 9
    assert rates(type="cosine") == [0.5, 1, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]
    assert rates(type="cosine_with_restarts", num_cycles=2) == [0.5, 1, 1, 0.8536, 0.5, 0.1464, 1, 0.8536, 0.5, 0.1464]
