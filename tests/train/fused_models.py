"""Small models with an adapter for tests of the fast update, ragged batches for them, and an exact gradient.

`exact_gradient` computes what `train.fast` does by torch's autograd alone: every completion by itself with its whole
prompt, dense attention, the adapter beside the weights. In float64 the two differ by rounding only, which transformers
does not allow: it computes norms in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from job_runs import config
from peft import PeftModel
from reference_attention import reference_attend
from tiny_models import WORDS, random_model
from torch import Tensor

from rewardsmith.rollout.adapter import adapter_tensors
from rewardsmith.rollout.model.architecture import describe
from rewardsmith.rollout.model.layers import PlainOps, logits, run
from rewardsmith.rollout.model.weights import Weights
from rewardsmith.rollout.sampling import Support
from rewardsmith.train.batch import Example, Gradient, has_gradient, token_batch
from rewardsmith.train.fast import gradient as fast
from rewardsmith.train.fast.backward import BaseOps
from rewardsmith.train.fast.memory import Budget
from rewardsmith.train.lora import POLICY, attach
from rewardsmith.train.losses import LossSettings, token_losses

VOCAB, TEMPERATURE = len(WORDS), 0.9
# The first prompt comes twice; one-token completions, groups of one, prompts of one token.
BATCH = (
    ([5, 6, 7], (1, 4, 9, 30)),
    ([9], (12, 1, 1)),
    ([12, 3, 3, 8, 20], (3, 2, 5)),
    ([4, 4], (2,)),
    ([5, 6, 7], (6,)),
    ([1], (1,)),
)


def policy(
    family: str = "qwen2", dtype: torch.dtype = torch.float64, merge: bool = True, **changes: Any
) -> tuple[PeftModel, Weights]:
    """A PEFT model whose policy is not its reference, and the same as fused weights."""
    base = random_model(family).to(dtype)
    job = config(**changes)
    model = attach(base, job, "base")
    generator = torch.Generator().manual_seed(2)
    tensors = adapter_tensors(model, POLICY)
    for tensor in tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    weights = Weights.fuse(base, describe(base))
    weights.bind(tensors, job.lora_alpha / job.rank, merge=merge)
    for name, tensor in weights.adapter().items():
        tensor.copy_(tensors[name])
    weights.merge()
    return model, weights


def batch(shape: Sequence[tuple[list[int], Sequence[int]]] = BATCH, support: bool = False) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for prompt, lengths in shape:
        for length in lengths:
            ids = torch.randint(0, VOCAB, (length,), generator=generator)
            cut = None
            if support:
                others = [torch.randperm(VOCAB, generator=generator)[:9] for _ in range(length)]
                cut = Support.of(
                    [
                        torch.cat([own, rest[rest != own][: 3 + t % 5]])
                        for t, (own, rest) in enumerate(zip(ids.split(1), others, strict=True))
                    ]
                )
            made.append(
                Example(
                    prompt=prompt,
                    completion=ids.tolist(),
                    advantage=float(torch.randn((), generator=generator)),
                    weight=float(torch.rand((), generator=generator)),
                    sampler_logps=(-1 - torch.rand(length, generator=generator)).tolist(),
                    support=cut,
                )
            )
    return made


def old_logps(examples: Sequence[Example]) -> list[Tensor]:
    """As if of an earlier policy, some ratios beyond every bound."""
    generator = torch.Generator().manual_seed(4)
    return [
        torch.tensor(e.sampler_logps).double() + 0.5 * torch.randn(len(e.completion), generator=generator)
        for e in examples
    ]


def fast_gradient(
    weights: Weights, examples: Sequence[Example], settings: LossSettings, old: Any = None, budget: Budget | None = None
) -> tuple[Gradient, dict[str, Tensor]]:
    gradients = {name: torch.zeros_like(tensor) for name, tensor in weights.adapter().items()}
    found = fast.gradient(
        weights,
        examples,
        settings,
        temperature=TEMPERATURE,
        vocab=VOCAB,
        gradients=gradients,
        budget=budget or Budget(),
        old_logps=old,
    )
    return found, gradients


def exact_gradient(
    weights: Weights, examples: Sequence[Example], settings: LossSettings, old: Any = None
) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """(loss, gradients, log-probs of each example, None where it has no gradient). `weights` are not merged."""
    leaves = weights.adapter()
    loss, logps = torch.zeros((), dtype=torch.float64), []
    for leaf in leaves.values():
        leaf.requires_grad_()
    for place, example in enumerate(examples):
        if not has_gradient(example, settings):
            logps.append(None)
            continue
        own = exact_logps(weights, example, PlainOps())
        tokens = token_batch([example], None if old is None else [old[place]])
        if settings.beta:
            with torch.no_grad():
                tokens = replace(tokens, reference_logps_N=exact_logps(weights, example, BaseOps()))
        loss = loss + (token_losses(own, tokens, settings).losses_N * example.weight).sum()
        logps.append(own.detach())
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    gradients = {
        name: torch.zeros_like(leaf) if d is None else d for (name, leaf), d in zip(leaves.items(), found, strict=True)
    }
    return float(loss.detach()), gradients, logps


def exact_logps(weights: Weights, example: Example, ops: PlainOps) -> Tensor:
    ids = torch.tensor(example.prompt + example.completion[:-1])
    h_NH = run(weights, ids, reference_attend(weights.architecture, torch.arange(len(ids))), ops)
    logits_TV = logits(weights, h_NH[len(example.prompt) - 1 :], VOCAB) / TEMPERATURE
    if example.support is not None:
        for t in range(len(example.completion)):
            possible = example.support.ids[example.support.offsets[t] : example.support.offsets[t + 1]].long()
            hidden = torch.ones(VOCAB, dtype=torch.bool)
            hidden[possible] = False
            logits_TV = logits_TV.index_put((torch.tensor(t),), logits_TV[t].masked_fill(hidden, -torch.inf))
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(example.completion)[:, None]).squeeze(1)


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    a, b = (torch.cat([tensors[name].flatten() for name in sorted(tensors)]) for tensors in (one, other))
    return float((a - b).norm() / b.norm())
