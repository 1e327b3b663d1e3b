"""The gradient and the log-probs of one rank, from fused weights, without transformers.

One micro-batch after the other: `packed` lays its tokens end to end, `layers.run` computes them with the operations of
`backward` and `attention`, `head` makes the loss and its derivative by the last hidden states, autograd goes back. How
large a micro-batch may be is `memory`'s business. The plain path (`plain`) computes the same and is the measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from rewardsmith.rollout.model.layers import PlainOps, run
from rewardsmith.rollout.model.weights import Weights
from rewardsmith.train.batch import Example, Gradient, has_gradient, token_batch
from rewardsmith.train.fast.attention import PackedAttention
from rewardsmith.train.fast.backward import AdapterGradient, BaseOps, TrainedOps
from rewardsmith.train.fast.head import Head, PackLoss
from rewardsmith.train.fast.memory import Budget, out_of_memory
from rewardsmith.train.fast.packed import length, pack, split
from rewardsmith.train.fast.recompute import run_recomputing
from rewardsmith.train.losses import LossSettings

Found = TypeVar("Found")


def gradient(
    weights: Weights,
    examples: Sequence[Example],
    settings: LossSettings,
    *,
    temperature: float,
    vocab: int,
    gradients: Mapping[str, Tensor],
    budget: Budget,
    old_logps: Sequence[Tensor | None] | None = None,
) -> Gradient:
    """Adds d loss / d A and d B to `gradients`, which has the names and shapes of `weights.adapter()`.

    `old_logps` are the `logps` of the first update on these examples, None in that update. When memory runs out it
    begins again with less at a time. Raises ModelError when not even one completion fits.
    """
    learned = [place for place, example in enumerate(examples) if has_gradient(example, settings)]
    if not learned:
        return Gradient(0.0, 0.0 if settings.beta else None, 0, 0, 0, [None] * len(examples))
    head = Head(weights, temperature, vocab)

    def attempt(parts: Sequence[list[int]]) -> tuple[Gradient, AdapterGradient]:
        total = AdapterGradient(weights)
        found = _gradient(weights, examples, parts, settings, head, total, budget.recompute, old_logps)
        return found, total

    found, total = _as_fits(weights, examples, learned, budget, attempt)
    total.add_to(gradients)
    return found


def _as_fits(
    weights: Weights,
    examples: Sequence[Example],
    places: Sequence[int],
    budget: Budget,
    attempt: Callable[[Sequence[list[int]]], Found],
) -> Found:
    """`attempt` on the examples at `places` in micro-batches, and again in smaller ones when memory runs out."""
    prompt = max((len(examples[place].prompt) for place in places), default=0)
    longest = max((length(examples[place]) for place in places), default=0)
    while True:
        parts = split(examples, places, budget.rows(weights, prompt, longest))
        try:
            return attempt(parts)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Only here has Python let go of what the failed attempt held.
        budget.shrink(longest)


def _gradient(
    weights: Weights,
    examples: Sequence[Example],
    parts: Sequence[list[int]],
    settings: LossSettings,
    head: Head,
    total: AdapterGradient,
    recompute: bool,
    old_logps: Sequence[Tensor | None] | None,
) -> Gradient:
    """Of the examples at the places in `parts`, one micro-batch each, added to `total`."""
    ops = TrainedOps(total)
    logps: list[Tensor | None] = [None] * len(examples)
    losses = []
    for places in parts:
        batch = pack(examples, places).to(weights.embed_VH.device)
        attend = PackedAttention(weights.architecture, batch, weights.embed_VH.dtype)
        old = None if old_logps is None else [old_logps[place] for place in places]
        tokens = token_batch([examples[place] for place in places], old)
        if settings.beta:
            with torch.no_grad():
                reference_PH = run(weights, batch.ids_R, attend, BaseOps(), batch.predicting_P)
                tokens = replace(tokens, reference_logps_N=head.logps(reference_PH, batch))
        if recompute:
            h_PH, backward = run_recomputing(weights, batch.ids_R, attend, ops, batch.predicting_P)
        else:
            h_PH = run(weights, batch.ids_R, attend, ops, batch.predicting_P)
            backward = partial(torch.autograd.backward, h_PH)
        with torch.no_grad():
            loss, d_PH = head.gradient(h_PH.detach(), batch, tokens, settings)
        backward(d_PH)
        losses.append(loss)
        for place, logps_T in zip(places, torch.split(loss.logps_N, batch.lengths), strict=True):
            logps[place] = logps_T
    whole = PackLoss.total(losses)
    return Gradient(
        loss=float(whole.loss),
        kl=None if whole.kl is None else float(whole.kl),
        clipped_low=int(whole.clipped_low),
        clipped_high=int(whole.clipped_high),
        tokens=len(whole.logps_N),
        logps=logps,
    )


@torch.no_grad()
def logps(
    weights: Weights, examples: Sequence[Example], temperature: float, vocab: int, *, budget: Budget, base: bool = False
) -> list[Tensor]:
    """Log-probs of each completion's tokens under the policy, or with `base` under the model without its adapter.

    In the order of `examples`, float32 at least. Memory that runs out is met as in `gradient`. Raises ModelError.
    """
    head, ops = Head(weights, temperature, vocab), BaseOps() if base else PlainOps()

    def attempt(parts: Sequence[list[int]]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for places in parts:
            batch = pack(examples, places).to(weights.embed_VH.device)
            attend = PackedAttention(weights.architecture, batch, weights.embed_VH.dtype)
            logps_N = head.logps(run(weights, batch.ids_R, attend, ops, batch.predicting_P), batch)
            found |= dict(zip(places, torch.split(logps_N, batch.lengths), strict=True))
        return found

    found = _as_fits(weights, examples, range(len(examples)), budget, attempt)
    return [found[place] for place in range(len(examples))]


def cost(example: Example, settings: LossSettings) -> float:
    """What an example adds to the time of `gradient`, in rows of a pack; to divide a batch fairly."""
    return float(len(example.completion)) if has_gradient(example, settings) else 0.0
