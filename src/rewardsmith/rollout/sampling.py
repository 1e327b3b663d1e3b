"""How a token is drawn: temperature, top-k, top-p, inverse CDF. Pure functions on one decode step.

The random numbers of a completion are a function of its own seed and the token's position, so what it says does not
depend on the completions sampled beside it. Log-probs are those of the whole temperature-scaled distribution, also
where top-k or top-p cut the draw: the trainer computes the same ones.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_WIDTH = 64  # entries summed up at once when cumulating a whole vocabulary
_LIKELIEST = 64  # tokens looked at first when cutting by top-p


def completion_seed(*parts: int | str) -> int:
    """A 64-bit seed (signed) from what names a completion: run seed, step, row, sample."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def uniforms(seeds_B: Tensor, position: int) -> Tensor:
    """One number in [0, 1) per seed for the token at `position`, as float64: SplitMix64 (Steele et al. 2014)."""
    z_B = seeds_B + _signed((position + 1) * 0x9E3779B97F4A7C15)
    z_B = (z_B ^ _shifted(z_B, 30)) * _signed(0xBF58476D1CE4E5B9)
    z_B = (z_B ^ _shifted(z_B, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(z_B ^ _shifted(z_B, 31), 11).double() * 2.0**-53


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _shifted(z_B: Tensor, bits: int) -> Tensor:
    """Right shift that brings in zeros; torch's brings in the sign."""
    return (z_B >> bits) & ((1 << (64 - bits)) - 1)


def log_probs(logits_BV: Tensor, temperature: float, vocab: int) -> Tensor:
    """Float32 log-probs over the first `vocab` ids; a model's ids beyond those of its tokenizer are padding."""
    return (logits_BV[..., :vocab].float() / temperature).log_softmax(-1)


def draw(logps_BV: Tensor, uniforms_B: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One id per row. top-k comes first, then top-p on what is left; 0 and 1.0 switch them off."""
    probs_BV = logps_BV.exp()
    if not top_k and top_p == 1.0:
        return inverse_cdf(probs_BV, uniforms_B)
    weights_BN, ids_BN = support(probs_BV, top_k, top_p)
    return ids_BN.gather(1, inverse_cdf(weights_BN, uniforms_B)[:, None]).squeeze(1)


def support(probs_BV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """What a draw may choose from: (weights_BN, ids_BN), likeliest first, weight 0 for what top-p cuts off."""
    vocab = probs_BV.shape[1]
    weights_BN, ids_BN = probs_BV.topk(min(top_k or _LIKELIEST, vocab))
    if not top_k and (weights_BN.sum(-1) < top_p).any():
        weights_BN, ids_BN = probs_BV.sort(descending=True, stable=True)
    if top_p < 1.0:
        mass_B1 = weights_BN.sum(-1, keepdim=True) if top_k else 1.0
        mass_before_BN = weights_BN.cumsum(-1) - weights_BN
        weights_BN = weights_BN.masked_fill(mass_before_BN >= top_p * mass_B1, 0.0)
    return weights_BN, ids_BN


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
