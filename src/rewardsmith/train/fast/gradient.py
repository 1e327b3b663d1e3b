"""The gradient and the log-probs of one rank, from fused weights, without transformers.

One micro-batch after the other: `packed` lays its tokens end to end, `layers.run` computes them with the operations of
`backward` and `attention`, `head` makes the loss and its derivative by the last hidden states, autograd goes back. How
large a micro-batch may be is `memory`'s business. The plain path (`plain`) computes the same and is the measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

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
    prompt, longest = _extremes([examples[place] for place in learned])
    while True:
        total = AdapterGradient(weights)
        parts = split(examples, learned, budget.rows(weights, prompt, longest))
        try:
            found = _gradient(weights, examples, parts, settings, head, total, budget.recompute, old_logps)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        else:
            total.add_to(gradients)
            return found
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
        tokens = token_batch([examples[place] for place in places], _chosen(old_logps, places))
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


def _extremes(examples: Sequence[Example]) -> tuple[int, int]:
    """Rows of the longest prompt, and of the longest completion with its prompt."""
    return max((len(e.prompt) for e in examples), default=0), max(map(length, examples), default=0)


@torch.no_grad()
def logps(
    weights: Weights, examples: Sequence[Example], temperature: float, vocab: int, *, base: bool = False
) -> list[Tensor]:
    """Log-probs of each completion's tokens under the policy, or with `base` under the model without its adapter.

    In the order of `examples`, float32 at least.
    """
    head, ops = Head(weights, temperature, vocab), BaseOps() if base else PlainOps()
    found: dict[int, Tensor] = {}
    rows = Budget().rows(weights, *_extremes(examples))
    for places in split(examples, range(len(examples)), rows):
        batch = pack(examples, places).to(weights.embed_VH.device)
        attend = PackedAttention(weights.architecture, batch, weights.embed_VH.dtype)
        logps_N = head.logps(run(weights, batch.ids_R, attend, ops, batch.predicting_P), batch)
        found |= dict(zip(places, torch.split(logps_N, batch.lengths), strict=True))
    return [found[place] for place in range(len(examples))]


def cost(example: Example, settings: LossSettings) -> float:
    """What an example adds to the time of `gradient`, in rows of a pack; to divide a batch fairly."""
    return float(len(example.completion)) if has_gradient(example, settings) else 0.0


def _chosen(old_logps: Sequence[Tensor | None] | None, places: Sequence[int]) -> list[Tensor] | None:
    if old_logps is None:
        return None
    chosen = [logps for place in places if (logps := old_logps[place]) is not None]
    assert len(chosen) == len(places), "what has a gradient in one update of a batch has one in the first"
    return chosen
