"""How a token is drawn: temperature, top-k, top-p, min-p, inverse CDF. Pure functions on one decode step.

The random numbers of a completion are a function of its own seed and the token's position, so what it says does not
depend on the completions sampled beside it. Log-probs are those of the distribution that was drawn from: the whole
temperature-scaled one, or, where top-k, top-p or min-p cut it, what they left, renormalised. A cut draw says which ids
it could choose from (`Support`), so that the trainer renormalises over the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardsmith.errors import ModelError

MOST_IDS = 2**22  # in the support of one completion, all tokens together: 16 MiB
_WIDTH = 64  # entries summed up at once when cumulating a whole vocabulary
_LIKELIEST = 64  # tokens looked at first when cutting by top-p


@dataclass(frozen=True)
class Cut:
    """What limits a draw: the `top_k` likeliest ids, of these the fewest that hold `top_p` of their mass, of these the
    ones at least `min_p` times as likely as the likeliest (Nguyen et al. 2024). 0, 1.0 and 0.0 switch them off.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def acts(self) -> bool:
        return bool(self.top_k or self.top_p < 1.0 or self.min_p > 0.0)


@dataclass(frozen=True, eq=False)
class Support:
    """The ids that the draws of one completion could choose from: those of token t are ids[offsets[t]:offsets[t + 1]].

    `ids` are int32, likeliest first within a token; `offsets` are int64, one more than there are tokens.
    """

    ids: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, ids_by_token: Sequence[Tensor]) -> Support:
        counts = torch.tensor([0, *map(len, ids_by_token)])
        ids = torch.cat(list(ids_by_token)) if ids_by_token else torch.empty(0)
        return cls(ids.to("cpu", torch.int32), counts.cumsum(0))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, token: int) -> Tensor:
        return self.ids[int(self.offsets[token]) : int(self.offsets[token + 1])]

    def first(self, tokens: int) -> Support:
        """Of the first `tokens` tokens."""
        offsets = self.offsets[: tokens + 1]
        return Support(self.ids[: int(offsets[-1])], offsets)


class GrowingSupport:
    """The support of a completion that is being sampled, token by token."""

    def __init__(self) -> None:
        self._ids_by_token: list[Tensor] = []
        self._count = 0

    def add(self, ids: Tensor) -> None:
        """Of the next token. Raises ModelError when all of them together are more than `MOST_IDS`."""
        self._count += len(ids)
        if self._count > MOST_IDS:
            raise ModelError(
                f"the first {len(self._ids_by_token) + 1} tokens of a completion could be chosen from more than "
                f"{MOST_IDS} ids in all, too many to keep for the update. Set sampling_params.top_k, to 1000 for "
                "instance, or cut more by top_p or min_p"
            )
        self._ids_by_token.append(ids)

    def whole(self) -> Support:
        return Support.of(self._ids_by_token)


@dataclass(frozen=True)
class Draw:
    """One token per row. `support` has each row's ids to choose from, None where nothing was cut."""

    ids_B: Tensor
    logps_B: Tensor
    support: list[Tensor] | None = None


def completion_seed(*parts: int | str) -> int:
    """A 64-bit seed (signed) from what names a completion: run seed, step, row, sample."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def uniforms(seeds_B: Tensor, position: int | Tensor) -> Tensor:
    """One number in [0, 1) per seed for the token at `position` (of all, or of each), as float64: SplitMix64 (Steele
    et al. 2014).
    """
    if isinstance(position, Tensor):
        z_B = seeds_B + (position + 1) * _signed(0x9E3779B97F4A7C15)  # int64 wraps around, as it should
    else:
        z_B = seeds_B + _signed((position + 1) * 0x9E3779B97F4A7C15)
    z_B = (z_B ^ _shifted(z_B, 30)) * _signed(0xBF58476D1CE4E5B9)
    z_B = (z_B ^ _shifted(z_B, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(z_B ^ _shifted(z_B, 31), 11).double() * 2.0**-53


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _shifted(z_B: Tensor, bits: int) -> Tensor:
    """Right shift that brings in zeros; torch's brings in the sign."""
    return (z_B >> bits) & ((1 << (64 - bits)) - 1)


def log_probs(logits_BV: Tensor, temperature: float | Tensor, vocab: int) -> Tensor:
    """Log-probs over the first `vocab` ids, in float32 at least; a model's ids beyond those of its tokenizer are
    padding. `temperature` is one number or B x 1.
    """
    wide_BV = logits_BV[..., :vocab].to(torch.promote_types(logits_BV.dtype, torch.float32))
    return (wide_BV / temperature).log_softmax(-1)


def draw(logps_BV: Tensor, uniforms_B: Tensor, cut: Cut) -> Draw:
    """One id per row from the given log-probs, by the inverse of their cumulated sum."""
    if not cut.acts:
        ids_B = inverse_cdf(logps_BV.exp(), uniforms_B)
        return Draw(ids_B, logps_BV.gather(1, ids_B[:, None]).squeeze(1))
    weights_BN, ids_BN = support(logps_BV.exp(), cut)
    place_B1 = inverse_cdf(weights_BN, uniforms_B)[:, None]
    kept_BN = weights_BN > 0
    kept_logps_BN = logps_BV.gather(1, ids_BN).masked_fill(~kept_BN, -torch.inf)
    logps_B = (kept_logps_BN.gather(1, place_B1) - kept_logps_BN.logsumexp(-1, keepdim=True)).squeeze(1)
    # Cuts leave a beginning of each row, as the ids are sorted.
    counts = kept_BN.sum(-1).tolist()
    rows = ids_BN.to("cpu", torch.int32)
    return Draw(
        ids_BN.gather(1, place_B1).squeeze(1),
        logps_B,
        [row[:count].clone() for row, count in zip(rows, counts, strict=True)],
    )


def support(probs_BV: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """What a draw may choose from: (weights_BN, ids_BN), likeliest first, weight 0 for what is cut off."""
    vocab = probs_BV.shape[1]
    weights_BN, ids_BN = probs_BV.topk(min(cut.top_k or _LIKELIEST, vocab))
    if not cut.top_k and weights_BN.shape[1] < vocab and not _reaches(weights_BN, cut):
        weights_BN, ids_BN = probs_BV.sort(descending=True, stable=True)
    likeliest_B1 = weights_BN[:, :1]
    if cut.top_p < 1.0:
        mass_B1 = weights_BN.sum(-1, keepdim=True) if cut.top_k else 1.0
        mass_before_BN = weights_BN.cumsum(-1) - weights_BN
        weights_BN = weights_BN.masked_fill(mass_before_BN >= cut.top_p * mass_B1, 0.0)
    if cut.min_p > 0.0:
        weights_BN = weights_BN.masked_fill(weights_BN < cut.min_p * likeliest_B1, 0.0)
    return weights_BN, ids_BN


def _reaches(weights_BN: Tensor, cut: Cut) -> bool:
    """Whether in each row the ids looked at go down to where top-p or min-p cuts."""
    by_mass_B = weights_BN.sum(-1) >= cut.top_p if cut.top_p < 1.0 else torch.tensor(False)
    by_ratio_B = weights_BN[:, -1] < cut.min_p * weights_BN[:, 0]
    return bool((by_mass_B | by_ratio_B).all())


def inverse_cdf(weights_BN: Tensor, uniforms_B: Tensor) -> Tensor:
    """The index whose stretch of the cumulated weights holds the given share of their sum; never one of weight 0.

    In two levels, sums of 64 entries and then one of those stretches: cumulating a whole vocabulary is slow.
    """
    rows, size = weights_BN.shape
    weights_BCW = torch.nn.functional.pad(weights_BN, (0, -size % _WIDTH)).view(rows, -1, _WIDTH)
    upto_BC = weights_BCW.sum(-1, dtype=torch.float64).cumsum(-1)
    below_one_B1 = uniforms_B.double()[:, None].clamp(max=1 - 2.0**-52)
    target_B1 = below_one_B1 * upto_BC[:, -1:]
    stretch_B1 = torch.searchsorted(upto_BC, target_B1, right=True).clamp(max=upto_BC.shape[1] - 1)
    before_B1 = torch.nn.functional.pad(upto_BC, (1, 0)).gather(1, stretch_B1)
    sum_B1 = upto_BC.gather(1, stretch_B1) - before_B1
    inside_BW = weights_BCW.gather(1, stretch_B1[:, :, None].expand(-1, 1, _WIDTH)).squeeze(1).double().cumsum(-1)
    # As a share, because the two levels add up the same numbers in another order.
    rest_B1 = ((target_B1 - before_B1) / sum_B1).clamp(0, 1 - 2.0**-52) * inside_BW[:, -1:]
    index_B1 = torch.searchsorted(inside_BW, rest_B1, right=True).clamp(max=_WIDTH - 1)
    return (stretch_B1 * _WIDTH + index_B1).squeeze(1).clamp(max=size - 1)
