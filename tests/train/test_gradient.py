"""The gradient of a whole update against an independent, obvious implementation, and its invariances."""

import itertools

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
from rewardsmith.train import batch as batch_module
from rewardsmith.train.lora import POLICY, attach, parameters
from rewardsmith.train.samples import Sample, examples, with_advantages
from rewardsmith.train.update import add_gradient, make_optimizer, rate_factor, update

VOCAB, MAX_TOKENS = len(WORDS), 12
PROMPTS = [[5, 6, 7], [9], [12, 3, 3, 8, 20], [4, 4]]
# Ragged, with one-token completions; None has no total; the third group has no signal, the last one has one total.
LENGTHS = [[1, 4, 9], [12, 1, 1], [3, 2, 5], [2, 2, 7]]
TOTALS = [[0.0, 1.0, 0.25], [2.0, None, -1.0], [0.5, 0.5, 0.5], [None, 1.0, None]]


def policy(family: str = "qwen2", **changes) -> PeftModel:
    """A float64 model whose policy is not its reference."""
    model = attach(random_model(family).double(), config(**changes), "base")
    generator = torch.Generator().manual_seed(2)
    for tensor in adapter_tensors(model, POLICY).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    assert all(parameter.dtype == torch.float64 for parameter in parameters(model))
    return model


def groups() -> list[list[Sample]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for row, (prompt, lengths, totals) in enumerate(zip(PROMPTS, LENGTHS, TOTALS, strict=True)):
        group = []
        for number, (length, total) in enumerate(zip(lengths, totals, strict=True)):
            ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
            completion = Completion(ids, [0.0] * length, "stop", "")
            group.append(Sample(Prompt(row, "", prompt, {}), number, completion, {"f": Score("ok", total, 0)}, total))
        made.append(group)
    return made


def straightforward(model: PeftModel, job: GRPOConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient with one whole forward per completion and formulas written out per completion."""
    model.set_adapter(POLICY)
    everything = [
        (prompt, s.completion.ids, s.total, g)
        for g, (prompt, group) in enumerate(zip(PROMPTS, groups(), strict=True))
        for s in group
    ]
    counted = [item for item in everything if item[2] is not None]
    all_totals = torch.tensor([item[2] for item in counted], dtype=torch.float64)
    losses = []
    for prompt, ids, total, g in counted:
        own_group = torch.tensor([t for t in TOTALS[g] if t is not None], dtype=torch.float64)
        advantage = 0.0
        if len(own_group) > 1 and own_group.max() > own_group.min():
            spread = {"group_std": own_group.std(), "group_mean": 1 - 1e-6, "batch_std": all_totals.std()}
            advantage = float((total - own_group.mean()) / (spread[job.advantage] + 1e-6))

        def logps(prompt: list[int] = prompt, ids: list[int] = ids) -> torch.Tensor:
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, :, :VOCAB]
            all_logps = (logits / job.sampling_params.temperature).log_softmax(-1)
            return torch.stack([all_logps[len(prompt) - 1 + t, token] for t, token in enumerate(ids)])

        own = logps()
        ratio = (own - own.detach()).exp()
        clipped = ratio.clamp(1 - job.clip_low, 1 + job.clip_high)
        per_token = -torch.minimum(ratio * advantage, clipped * advantage)
        if job.beta:
            with torch.no_grad(), model.disable_adapter():
                reference = logps()
            per_token = per_token + job.beta * ((reference - own).exp() - 1 - (reference - own))
        losses.append(per_token)
    tokens = sum(len(loss) for loss in losses)
    loss = {
        "grpo": lambda: sum(loss.mean() for loss in losses) / len(losses),
        "dapo": lambda: sum(loss.sum() for loss in losses) / tokens,
        "bnpo": lambda: sum(loss.sum() for loss in losses) / tokens,
        "dr_grpo": lambda: sum(loss.sum() for loss in losses) / (len(losses) * MAX_TOKENS),
    }[job.loss]()
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), gradient(model)


def gradient(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if f".{POLICY}." in name}


def ours(model: PeftModel, job: GRPOConfig) -> tuple[float, dict[str, torch.Tensor]]:
    make_optimizer(model, job.optimizer, 1e-3)
    loss, _ = add_gradient(model, examples(with_advantages(groups(), job), job, MAX_TOKENS), job, VOCAB)
    return loss, gradient(model)


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    a, b = (torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (one, other))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("loss", "advantage", "beta"),
    list(itertools.product(("grpo", "bnpo", "dr_grpo", "dapo"), ("group_std", "group_mean", "batch_std"), (0.0, 0.1))),
)
def test_the_gradient_is_that_of_the_obvious_implementation(loss: str, advantage: str, beta: float):
    job = config(
        loss=loss, advantage=advantage, beta=beta, sampling_params={"temperature": 0.9, "max_tokens": MAX_TOKENS}
    )
    model = policy()
    expected_loss, expected = straightforward(model, job)
    actual_loss, actual = ours(model, job)
    assert relative_difference(actual, expected) < 1e-6
    assert abs(actual_loss - expected_loss) < 1e-9 + 1e-6 * abs(expected_loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_families_with_kl(family: str):
    job = config(beta=0.05, sampling_params={"temperature": 1.3, "max_tokens": MAX_TOKENS})
    model = policy(family)
    assert relative_difference(ours(model, job)[1], straightforward(model, job)[1]) < 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_micro_batches_order_and_padding_change_nothing(beta: float, monkeypatch: pytest.MonkeyPatch):
    job = config(beta=beta)
    model = policy()
    whole_loss, whole = ours(model, job)
    batch = examples(with_advantages(groups(), job), job, MAX_TOKENS)
    for limit, order in ((1, 1), (20, -1), (40, 1)):
        monkeypatch.setattr(batch_module, "MICRO_BATCH_TOKENS", limit)
        make_optimizer(model, job.optimizer, 1e-3)
        loss, _ = add_gradient(model, batch[::order], job, VOCAB)
        assert relative_difference(gradient(model), whole) < 1e-9
        assert abs(loss - whole_loss) < 1e-12


def test_splitting_by_tokens_really_splits(monkeypatch: pytest.MonkeyPatch):
    batch = examples(with_advantages(groups(), config()), config(), MAX_TOKENS)
    split = {}
    for limit in (1, 40, 10_000):
        monkeypatch.setattr(batch_module, "MICRO_BATCH_TOKENS", limit)
        parts = list(batch_module.micro_batches(batch, VOCAB, torch.device("cpu")))
        assert sum(len(part.targets_N) for part in parts) == sum(map(sum, LENGTHS))
        split[limit] = len(parts)
    assert split[1] == len(batch) > split[40] > split[10_000] == 1


def test_without_kl_only_completions_with_an_advantage_are_computed():
    model, job = policy(), config()
    rows = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ours(model, job)
    assert sum(rows) == 5  # three of the first group, two of the second


def test_a_batch_without_signal_or_without_totals_has_a_zero_gradient():
    job, model = config(), policy()
    make_optimizer(model, job.optimizer, 1e-3)
    without_signal = [[sample for sample in groups()[2]]]
    batch = examples(with_advantages(without_signal, job), job, MAX_TOKENS)
    assert add_gradient(model, batch, job, VOCAB) == (0.0, None)
    assert add_gradient(model, [], config(beta=0.1), VOCAB) == (0.0, 0.0)
    assert all(not grad.any() for grad in gradient(model).values())


def test_the_base_and_the_engines_adapter_get_no_gradient_and_do_not_move():
    job, model = config(beta=0.1), policy()
    before = {name: p.clone() for name, p in model.named_parameters() if f".{POLICY}." not in name}
    optimizer = make_optimizer(model, job.optimizer, 1e-2)
    batch = examples(with_advantages(groups(), job), job, MAX_TOKENS)
    update(model, optimizer, batch, job, vocab=VOCAB, step=1, total_steps=10)
    for name, parameter in model.named_parameters():
        if f".{POLICY}." not in name:
            assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_dropout_acts_on_the_adapter_and_is_the_same_in_a_repeated_step():
    job, model = config(lora_dropout=0.5, learning_rate=1e-12), policy(lora_dropout=0.5)
    optimizer = make_optimizer(model, job.optimizer, 1e-12)
    batch = examples(with_advantages(groups(), job), job, MAX_TOKENS)
    norms = [
        update(model, optimizer, batch, job, vocab=VOCAB, step=step, total_steps=10).grad_norm for step in (1, 1, 2)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] != pytest.approx(norms[2], rel=1e-3)


def test_the_gradient_is_clipped():
    job, model = config(max_grad_norm=1e-3), policy()
    batch = examples(with_advantages(groups(), job), job, MAX_TOKENS)
    result = update(model, make_optimizer(model, job.optimizer, 1e-3), batch, job, vocab=VOCAB, step=1, total_steps=4)
    clipped = torch.cat([grad.flatten() for grad in gradient(model).values()]).norm()
    assert result.grad_norm > 1e-2 and clipped == pytest.approx(1e-3, rel=1e-4)


def test_learning_rates_by_hand():
    def rates(**scheduler) -> list[float]:
        job = config(lr_scheduler=scheduler, warmup_ratio=0.2)
        return [round(rate_factor(job.lr_scheduler, job.warmup_ratio, step, 10), 4) for step in range(1, 11)]

    assert rates(type="linear") == [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates(type="constant") == [1] * 10
    assert rates(type="constant_with_warmup") == [0.5] + [1] * 9
    assert rates(type="cosine") == [0.5, 1, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]
    assert rates(type="cosine_with_restarts", num_cycles=2) == [0.5, 1, 1, 0.8536, 0.5, 0.1464, 1, 0.8536, 0.5, 0.1464]
