"""What a token adds to the loss: policy loss, KL to the reference, correction for a sampler that is not the trainer.

Pure functions on flat tokens (N of them, completion after completion) with nothing but torch: the plain path calls them
on micro-batches, the fast path on slices as its head computes them. The loss of a batch is the sum of
`weights_N * losses_N` (`grpo.weights`), so any split gives the same gradient, as long as `needs_whole_completions` is
kept to. Formulas, papers and when to use which: docs/losses.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rewardsmith.config import Correction, GRPOConfig, KLEstimator, Level, Loss, SamplerCorrectionConfig

LARGEST_LOG_RATIO = 20.0  # e^20 is far beyond every bound, and still finite in float32 when multiplied
TAU_POSITIVE, TAU_NEGATIVE = 1.0, 1.05  # SAPO's temperatures (arXiv 2511.20347)


@dataclass(frozen=True)
class LossSettings:
    """Plain numbers and names, everything resolved. `beta` is 0 when no KL is in the loss.

    A ratio is bounded by 1 - `clip_low` and 1 + `clip_high`; infinity is no bound.
    """

    loss: Loss = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    beta: float = 0.0
    kl_estimator: KLEstimator = "k3"
    correction: Correction = "none"
    correction_level: Level = "token"
    correction_low: float = 0.0
    correction_high: float = 2.0

    @classmethod
    def of(cls, config: GRPOConfig) -> LossSettings:
        """A correction that the config leaves open is off."""
        correction = config.sampler_correction
        clip_low, clip_high = config.clip_bounds
        return cls(
            loss=config.loss,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=config.dual_clip,
            beta=config.beta if config.kl_in == "loss" else 0.0,
            kl_estimator=config.kl_estimate,
            correction=correction.mode or "none",
            correction_level=correction.level or ("sequence" if config.loss == "gspo" else "token"),
            correction_low=correction.lowest,
            correction_high=correction.high,
        )


def dead_settings(config: GRPOConfig) -> Iterator[str]:
    """What is set and cannot act, in words for the user; pairs that make no sense at all are refused by the config."""
    if config.updates_per_batch == 1:
        if config.clip_low is not None or config.clip_high is not None:
            yield "clip_low and clip_high cannot act: with one update per batch the ratio they bound is 1"
        if twin := {"gspo": "grpo", "sapo": "grpo", "cispo": "dapo"}.get(config.loss):
            yield f"loss {config.loss} has the same gradient as {twin}: with one update per batch all ratios are 1"
    if config.kl_estimator is not None and config.beta == 0:
        yield f"kl_estimator={config.kl_estimator} cannot act: beta is 0, so there is no KL"
    elif config.kl_estimator == "k1" and config.kl_in == "loss":
        yield "kl_estimator=k1 in the loss has no gradient on average and only adds noise: use k2 or k3"
    elif config.kl_estimator in ("k2", "k3") and config.kl_in == "reward":
        yield f"kl_estimator={config.kl_estimator} in the reward has another gradient than the KL: only k1 has its own"
    if config.sampler_correction.mode == "none" and has_bounds(config.sampler_correction):
        yield "level, low and high of sampler_correction cannot act: its mode is none"


def has_bounds(correction: SamplerCorrectionConfig) -> bool:
    """Whether anything is set that only acts with a mode."""
    return (correction.level, correction.low, correction.high) != (None, None, 2.0)


@dataclass(frozen=True)
class TokenBatch:
    """Sampled tokens and what is known of each. `completion_N` numbers the completions, ascending.

    `sampler_logps_N` are of the sampler, as sampled. `old_logps_N` are of the trainer's policy before the first update
    on this batch: None in that update, where it is the policy itself. `reference_logps_N` are of the model with its
    adapter off, None without KL in the loss.
    """

    completion_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    sampler_logps_N: Tensor
    old_logps_N: Tensor | None = None
    reference_logps_N: Tensor | None = None

    def __getitem__(self, tokens: slice) -> TokenBatch:
        return TokenBatch(*(None if tensor is None else tensor[tokens] for tensor in self._tensors()))

    def to(self, like: Tensor) -> TokenBatch:
        """On the device of `like`, and its dtype but for `completion_N`."""
        first, *others = self._tensors()
        return TokenBatch(first.to(like.device), *(None if tensor is None else tensor.to(like) for tensor in others))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class TokenLosses:
    """`losses_N` is to be minimised, weighted by `weights_N`. The rest is for the eye and has no gradient.

    `kl_N` is k3, whatever is in the loss. A token is clipped when a bound has changed its gradient.
    """

    losses_N: Tensor
    kl_N: Tensor | None
    clipped_low_N: Tensor
    clipped_high_N: Tensor


def needs_whole_completions(settings: LossSettings, first_update: bool) -> bool:
    """Whether a token's loss takes log-probs of its completion's other tokens, so that no slice may cut one in two."""
    by_sequence = settings.correction != "none" and settings.correction_level == "sequence"
    return by_sequence or (settings.loss == "gspo" and not first_update)


def token_losses(logps_N: Tensor, tokens: TokenBatch, settings: LossSettings) -> TokenLosses:
    """The loss of each token, differentiable in `logps_N`, its log-probs under the policy as it is now."""
    tokens = tokens.to(logps_N)
    own_N = logps_N.detach()
    old_N = own_N if tokens.old_logps_N is None else tokens.old_logps_N
    advantages_N = tokens.advantages_N
    log_ratio_N = logps_N - old_N
    if settings.loss == "gspo" and tokens.old_logps_N is not None:
        # GSPO-token: the sequence's ratio as value, the token's own log-prob for the gradient.
        log_ratio_N = completion_means(own_N - old_N, tokens.completion_N) + (logps_N - own_N)
    ratio_N = bounded_ratio(log_ratio_N)
    low, high = settings.clip_low, settings.clip_high
    match settings.loss:
        case "cispo":
            losses_N = cispo(logps_N, ratio_N, advantages_N, low, high)
        case "sapo":
            losses_N = sapo(ratio_N, advantages_N)
        case "grpo" | "bnpo" | "dr_grpo" | "dapo" | "gspo":
            losses_N = clipped_surrogate(ratio_N, advantages_N, low, high, settings.dual_clip)
        case _:
            assert_never(settings.loss)
    if settings.correction != "none":
        losses_N = losses_N * sampler_correction(old_N, tokens, settings)
    if settings.beta:
        assert tokens.reference_logps_N is not None, "a loss with KL needs the reference's log-probs"
        losses_N = losses_N + settings.beta * KL[settings.kl_estimator](logps_N, tokens.reference_logps_N)
    kl_N = None if tokens.reference_logps_N is None else k3(own_N, tokens.reference_logps_N)
    low_N, high_N = clipped(ratio_N.detach(), advantages_N, settings)
    return TokenLosses(losses_N, kl_N, low_N, high_N)


def clipped_surrogate(
    ratio_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's: the smaller of ratio * A and clipped ratio * A; with `dual_clip` c never less than c * A for A < 0."""
    gain_N = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantages_N)
    if dual_clip is not None:
        gain_N = torch.where(advantages_N < 0, torch.maximum(gain_N, dual_clip * advantages_N), gain_N)
    return -gain_N


def cispo(logps_N: Tensor, ratio_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """REINFORCE with the clipped ratio as a constant weight: a clipped token keeps its gradient."""
    return -ratio_N.detach().clamp(1 - clip_low, 1 + clip_high) * advantages_N * logps_N


def sapo(ratio_N: Tensor, advantages_N: Tensor) -> Tensor:
    """A gate in place of the clip: 4 / tau * sigmoid(tau (ratio - 1)), whose slope is 1 on-policy and fades away."""
    tau_N = torch.full_like(advantages_N, TAU_NEGATIVE).masked_fill(advantages_N > 0, TAU_POSITIVE)
    return -(tau_N * (ratio_N - 1)).sigmoid() * 4 / tau_N * advantages_N


def clipped(ratio_N: Tensor, advantages_N: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Which tokens' gradients the lower and the upper bound have changed."""
    low_N, high_N = ratio_N < 1 - settings.clip_low, ratio_N > 1 + settings.clip_high
    if settings.loss == "sapo":
        return torch.zeros_like(low_N), torch.zeros_like(high_N)
    if settings.loss == "cispo":
        return low_N & (advantages_N != 0), high_N & (advantages_N != 0)
    high_N = high_N & (advantages_N > 0)
    if settings.dual_clip is not None:
        high_N = high_N | ((ratio_N > settings.dual_clip) & (advantages_N < 0))
    return low_N & (advantages_N < 0), high_N


def sampler_correction(old_N: Tensor, tokens: TokenBatch, settings: LossSettings) -> Tensor:
    """What the sampled tokens weigh because another program sampled them: old policy / sampler, bounded.

    "truncate" moves a ratio to the bounds, "mask" puts 0 for one outside. At level "sequence" the ratio is the product
    over the completion.
    """
    log_ratio_N = old_N.detach() - tokens.sampler_logps_N
    if settings.correction_level == "sequence":
        log_ratio_N = completion_sums(log_ratio_N, tokens.completion_N)[0]
    ratio_N = bounded_ratio(log_ratio_N)
    low, high = settings.correction_low, settings.correction_high
    if settings.correction == "truncate":
        return ratio_N.clamp(low, high)
    return ratio_N.masked_fill((ratio_N < low) | (ratio_N > high), 0.0)


def bounded_ratio(log_ratio_N: Tensor) -> Tensor:
    return log_ratio_N.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def completion_sums(values_N: Tensor, completion_N: Tensor) -> tuple[Tensor, Tensor]:
    """For each token the sum over its completion, and the completion's number of tokens."""
    _, row_N, count_B = torch.unique_consecutive(completion_N, return_inverse=True, return_counts=True)
    sum_B = values_N.new_zeros(len(count_B)).index_add(0, row_N, values_N)
    return sum_B[row_N], count_B[row_N]


def completion_means(values_N: Tensor, completion_N: Tensor) -> Tensor:
    sums_N, counts_N = completion_sums(values_N, completion_N)
    return sums_N / counts_N


def k1(logps_N: Tensor, reference_logps_N: Tensor) -> Tensor:
    """log(policy / reference): the unbiased estimate of the KL with the most noise; may be negative (Schulman 2020)."""
    return logps_N - reference_logps_N


def k2(logps_N: Tensor, reference_logps_N: Tensor) -> Tensor:
    """Half of k1 squared: a biased value with little noise, whose gradient is that of the KL when on-policy."""
    return 0.5 * (logps_N - reference_logps_N).square()


def k3(logps_N: Tensor, reference_logps_N: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) for each token sampled from the policy: unbiased and never negative.

    Where the reference has e^20 times the policy's probability and more it is bounded, as ratios are, and has no
    gradient. On the other side nothing grows faster than the log-probs, and all of it counts.
    """
    log_x_N = (reference_logps_N - logps_N).clamp(max=LARGEST_LOG_RATIO)
    return log_x_N.exp() - 1 - log_x_N


KL = {"k1": k1, "k2": k2, "k3": k3}
