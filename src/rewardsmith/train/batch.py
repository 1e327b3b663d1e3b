"""Trained completions, and their tokens laid end to end as the losses want them.

Shared by the plain and the fast path: what an example is, which examples have a gradient at all, the flat `TokenBatch`
of some of them, and what comes out beside the gradient. Weights come from `grpo.weights` over the whole batch; how the
ids get through the model is each path's own matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rewardsmith.rollout.sampling import Support
from rewardsmith.train.losses import LossSettings, TokenBatch


@dataclass(frozen=True)
class Example:
    """One completion to learn from: ids of prompt and completion, and what `grpo` makes of its score.

    `sampler_logps` are the log-probs that the tokens were drawn with. `support` has the ids that each draw could choose
    from when top-k, top-p or min-p cut it: the distribution is normalised over these on both sides.
    """

    prompt: list[int]
    completion: list[int]
    advantage: float
    weight: float
    sampler_logps: list[float]
    support: Support | None = None


@dataclass(frozen=True)
class Gradient:
    """What came out beside the gradient itself, summed over the tokens that it was computed from.

    `kl` is k3's to the reference in nats, None without a reference pass; `clipped_low`, `clipped_high` and `tokens` are
    numbers of tokens. `logps` are the policy's, one tensor per example in the order given, None for an example that has
    no gradient and was passed over.
    """

    loss: float
    kl: float | None
    clipped_low: int
    clipped_high: int
    tokens: int
    logps: list[Tensor | None]

    @classmethod
    def total(cls, parts: Sequence[Self]) -> Self:
        """Of parts of one batch, their examples one part after the other."""
        kls = [part.kl for part in parts if part.kl is not None]
        return cls(
            loss=sum(part.loss for part in parts),
            kl=sum(kls) if kls else None,
            clipped_low=sum(part.clipped_low for part in parts),
            clipped_high=sum(part.clipped_high for part in parts),
            tokens=sum(part.tokens for part in parts),
            logps=[logps for part in parts for logps in part.logps],
        )


def has_gradient(example: Example, settings: LossSettings) -> bool:
    """Whether it has to be computed. Every policy loss is a multiple of the advantage, so without KL in the loss a
    completion of advantage 0 adds nothing but its share of the others' denominators, which their weights know."""
    return bool(example.weight and (example.advantage or settings.beta))


def token_batch(examples: Sequence[Example], old_logps: Sequence[Tensor | None] | None = None) -> TokenBatch:
    """The tokens of `examples` in float64 on the CPU; `old_logps` has one tensor per example."""
    known = [logps for logps in old_logps or () if logps is not None]
    assert old_logps is None or len(known) == len(examples), (
        "what has a gradient in one update of a batch has one in the first"
    )
    lengths_B = torch.tensor([len(example.completion) for example in examples], dtype=torch.long)

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(lengths_B)

    return TokenBatch(
        completion_N=torch.arange(len(examples)).repeat_interleave(lengths_B),
        advantages_N=per_token([example.advantage for example in examples]),
        weights_N=per_token([example.weight for example in examples]),
        sampler_logps_N=torch.tensor([p for example in examples for p in example.sampler_logps], dtype=torch.float64),
        old_logps_N=None if old_logps is None else torch.cat(known).detach(),
    )
