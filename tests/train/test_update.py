"""The optimizer's part of a step: what moves, clipping, several updates on a batch, learning rates."""

import pytest
import torch
from job_runs import config
from obvious_gradient import VOCAB, gradient, policy, whole_batch
from peft import PeftModel

from rewardsmith.train.batch import Gradient, token_batch
from rewardsmith.train.lora import POLICY, parameters
from rewardsmith.train.plain import PlainPath
from rewardsmith.train.update import make_optimizer, rate_factor, update


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


def test_old_log_probs_are_there_for_all_that_is_learned_from():
    examples = whole_batch(config())[:2]
    with pytest.raises(AssertionError, match="has one in the first"):
        token_batch(examples, [torch.zeros(1), None])


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
