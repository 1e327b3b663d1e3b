"""The language model head fused with the loss: log-probs of the targets and the gradient of the hidden states.

Logits exist for a chunk of targets at a time, never for tokens x vocabulary. Where a token's loss depends on its own
log-prob only, one pass does both; otherwise log-probs come first and the logits are computed twice. What a token adds
to the loss is in `losses`; how hidden states come about is `gradient`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardsmith.rollout.model.layers import logits
from rewardsmith.rollout.model.weights import Weights
from rewardsmith.train.fast.packed import Pack
from rewardsmith.train.losses import LossSettings, TokenBatch, needs_whole_completions, token_losses

# Logits of a chunk: what stays near a core, and on a GPU what keeps it busy; and rows enough to read the head for.
CHUNK_LOGITS = {"cpu": 2**19, "cuda": 2**27}
FEWEST_ROWS = 128


@dataclass(frozen=True)
class Head:
    """Distributions over the first `vocab` ids at the sampling temperature, as the sampler has them."""

    weights: Weights
    temperature: float
    vocab: int

    def logps(self, h_PH: Tensor, pack: Pack) -> Tensor:
        """Log-probs of the pack's targets, N in float32 at least. `h_PH` are the predicting rows' hidden states."""
        parts = [self._chunk(h_PH, pack, part)[0] for part in self._parts(h_PH, pack)]
        return torch.cat(parts)

    def gradient(self, h_PH: Tensor, pack: Pack, tokens: TokenBatch, settings: LossSettings) -> tuple[PackLoss, Tensor]:
        """The loss of the pack's targets, `tokens`, and its derivative by `h_PH`."""
        tokens = tokens.to(h_PH.new_empty(0, dtype=torch.promote_types(h_PH.dtype, torch.float32)))
        whole = needs_whole_completions(settings, tokens.old_logps_N is None)
        losses = [_loss(self.logps(h_PH, pack), tokens, settings)] if whole else []
        d_PH = torch.zeros_like(h_PH, dtype=tokens.weights_N.dtype)
        for part in self._parts(h_PH, pack):
            logps_C, probs_CV, bends_CV = self._chunk(h_PH, pack, part)
            if not whole:
                losses.append(_loss(logps_C, tokens[part], settings))
            slopes_C = losses[0].slopes_N[part] if whole else losses[-1].slopes_N
            # d log-prob / d logit is 1 - probability for the target, - probability for all others.
            slopes_C1 = (slopes_C / self.temperature)[:, None]
            d_CV = probs_CV.mul_(-slopes_C1).scatter_add_(1, pack.targets_N[part, None], slopes_C1)
            if bends_CV is not None:
                d_CV.mul_(bends_CV)
            d_CH = (d_CV.to(h_PH.dtype) @ self.weights.head_VH[: self.vocab]).to(d_PH.dtype)
            # Added up: the last row of a prompt predicts the first token of every completion.
            d_PH.index_add_(0, pack.source_N[part], d_CH)
        return PackLoss.total(losses), d_PH.to(h_PH.dtype)

    def _parts(self, h_PH: Tensor, pack: Pack) -> Iterator[slice]:
        size = max(FEWEST_ROWS, CHUNK_LOGITS["cpu" if h_PH.device.type == "cpu" else "cuda"] // self.vocab)
        count = len(pack.targets_N)
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def _chunk(self, h_PH: Tensor, pack: Pack, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """(log-probs of the targets, probabilities, d logit / d uncapped logit or None)."""
        logits_CV = logits(self.weights, h_PH.index_select(0, pack.source_N[part]), self.vocab)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        cap = self.weights.architecture.logit_softcap
        bends_CV = None if cap is None else 1 - (logits_CV / cap).square()
        if self.temperature != 1.0:
            logits_CV = logits_CV.div_(self.temperature)
        if pack.support is not None:
            logits_CV.masked_fill_(_impossible(pack, part, logits_CV), -torch.inf)
        target_C1 = logits_CV.gather(1, pack.targets_N[part, None])
        highest_C1 = logits_CV.amax(1, keepdim=True)
        probs_CV = logits_CV.sub_(highest_C1).exp_()
        sum_C1 = probs_CV.sum(1, keepdim=True)
        return (target_C1 - highest_C1 - sum_C1.log()).squeeze(1), probs_CV.div_(sum_C1), bends_CV


@dataclass(frozen=True)
class PackLoss:
    """The loss of some tokens, summed, and what `batch.Gradient` tells of it. `slopes_N` is d loss / d log-prob."""

    loss: Tensor
    kl: Tensor | None
    clipped_low: Tensor
    clipped_high: Tensor
    logps_N: Tensor
    slopes_N: Tensor

    @classmethod
    def total(cls, parts: Sequence[PackLoss]) -> PackLoss:
        kls = [part.kl for part in parts if part.kl is not None]
        return cls(
            loss=torch.stack([part.loss for part in parts]).sum(),
            kl=torch.stack(kls).sum() if kls else None,
            clipped_low=torch.stack([part.clipped_low for part in parts]).sum(),
            clipped_high=torch.stack([part.clipped_high for part in parts]).sum(),
            logps_N=torch.cat([part.logps_N for part in parts]),
            slopes_N=torch.cat([part.slopes_N for part in parts]),
        )


def _loss(logps_N: Tensor, tokens: TokenBatch, settings: LossSettings) -> PackLoss:
    with torch.enable_grad():
        logps_N = logps_N.detach().requires_grad_()
        found = token_losses(logps_N, tokens, settings)
        loss = (found.losses_N * tokens.weights_N).sum()
        (slopes_N,) = torch.autograd.grad(loss, logps_N)
    return PackLoss(
        loss=loss.detach(),
        kl=None if found.kl_N is None else found.kl_N.sum(),
        clipped_low=found.clipped_low_N.sum(),
        clipped_high=found.clipped_high_N.sum(),
        logps_N=logps_N.detach(),
        slopes_N=slopes_N,
    )


def _impossible(pack: Pack, part: slice, logits_CV: Tensor) -> Tensor:
    """True for the ids that the draw of a target could not choose."""
    assert pack.support is not None
    first, last = pack.support.offsets[part.start], pack.support.offsets[part.stop]
    counts_C = pack.support.offsets[part.start : part.stop + 1].diff()
    row = torch.arange(len(counts_C)).repeat_interleave(counts_C)
    impossible_CV = torch.ones(logits_CV.shape, dtype=torch.bool, device=logits_CV.device)
    impossible_CV[row.to(logits_CV.device), pack.support.ids[first:last].long().to(logits_CV.device)] = False
    return impossible_CV
