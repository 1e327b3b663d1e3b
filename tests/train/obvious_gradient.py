"""A ragged batch, and the gradient of a whole update on it written out per completion, as the papers have it.

Independent of the code under test, and obvious: one forward per completion, formulas in plain Python. `ours` is what
the plain path makes of the same batch.
"""

from functools import cache

import torch
from job_runs import config
from peft import PeftModel
from tiny_models import WORDS, random_model

from rewardsmith.config import GRPOConfig
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rollout.adapter import adapter_tensors
from rewardsmith.rollout.engine import Completion
from rewardsmith.rollout.prompts import Prompt
from rewardsmith.train.batch import Example, Gradient
from rewardsmith.train.lora import POLICY, attach, parameters
from rewardsmith.train.plain import PlainPath
from rewardsmith.train.samples import Sample, examples, with_advantages
from rewardsmith.train.update import make_optimizer

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


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    a, b = (torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (one, other))
    return float((a - b).norm() / b.norm())
