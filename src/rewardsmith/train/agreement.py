"""Do engine and trainer run the same policy? Log-probs of the same tokens under both, every step.

Fingerprints and `Weights.verify` prove what was delivered; this proves what is computed with it. The engine's log-probs
come with the completions. The trainer's come from the update, for all that is learned from, and from the transformers
model with PEFT's own adapter for one completion a step: that one shares no code and no merged weights with the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewardsmith.config import GRPOConfig
from rewardsmith.errors import DeliveryError
from rewardsmith.rollout.sampling import completion_seed
from rewardsmith.train.batch import Example
from rewardsmith.train.losses import k3
from rewardsmith.train.plain import PlainPath

PROBE_TOKENS = 128  # of the completion that is probed
# Mean difference of log-probs per token at which the engine must be running something else: ten times and more above
# what the two paths differ by in rounding.
LIMITS = {torch.float64: 0.01, torch.float32: 0.01, torch.bfloat16: 0.2, torch.float16: 0.1}


@dataclass(frozen=True)
class Mismatch:
    """Trainer against sampler on the same tokens: KL(sampler || trainer) in nats per token, log-prob differences."""

    kl: float
    mean_difference: float
    max_difference: float

    @classmethod
    def of(cls, trainer_N: Tensor, sampler_N: Tensor) -> Mismatch:
        difference_N = trainer_N - sampler_N
        return cls(
            kl=float(k3(sampler_N, trainer_N).mean()),
            mean_difference=float(difference_N.abs().mean()),
            max_difference=float(difference_N.abs().max()),
        )

    def check(self, dtype: torch.dtype, step: int) -> None:
        """Raises DeliveryError when the two are of two policies."""
        if not self.mean_difference <= LIMITS[dtype]:
            raise DeliveryError(
                f"engine and trainer do not run the same policy: the log-probs of the same tokens differ by "
                f"{self.mean_difference:.3g} on average in step {step}, more than {LIMITS[dtype]}"
            )


def probe(plain: PlainPath, examples: Sequence[Example], config: GRPOConfig, step: int) -> Mismatch:
    """Of one completion by the plain path."""
    example = examples[probed(config.seed, step, len(examples))]
    part = replace(
        example,
        completion=example.completion[:PROBE_TOKENS],
        support=example.support and example.support.first(PROBE_TOKENS),
    )
    (trainer_N,) = plain.policy_logps([part], config)
    sampler_N = torch.tensor(example.sampler_logps[:PROBE_TOKENS], dtype=torch.float64)
    return Mismatch.of(trainer_N.double().cpu(), sampler_N)


def probed(seed: int, step: int, count: int) -> int:
    """Which of `count` completions: drawn anew every step, so that in time every place has its turn."""
    return completion_seed(seed, "probe", step) % count


def of_batch(examples: Sequence[Example], logps: Sequence[Tensor | None]) -> Mismatch | None:
    """Of all completions whose log-probs the update computed, without dropout; None when it computed none."""
    pairs = [(own, example.sampler_logps) for own, example in zip(logps, examples, strict=True) if own is not None]
    if not pairs:
        return None
    trainer_N = torch.cat([own for own, _ in pairs]).double().cpu()
    sampler_N = torch.tensor([logp for _, sampled in pairs for logp in sampled], dtype=torch.float64)
    return Mismatch.of(trainer_N, sampler_N)
