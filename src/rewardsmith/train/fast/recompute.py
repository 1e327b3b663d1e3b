"""Forward and backward pass that keep one residual stream per layer and compute each layer a second time.

For when memory is short (Chen et al. 2016, arXiv 1604.06174): a third more work, and of what one layer keeps for the
backward pass only one layer's at a time. The layers themselves are those of `layers.run`, one model of one layer after
the other. When this is done is `memory`'s decision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rewardsmith.rollout.model.layers import Attend, Ops, run
from rewardsmith.rollout.model.weights import Weights

NO_NORM = torch.empty(0)


class StretchOps:
    """`ops` for a stretch of the model that another one follows: instead of a last norm it has `NO_NORM`."""

    def __init__(self, ops: Ops) -> None:
        self.norm, self.linear, self.gate, self._add_norm = ops.norm, ops.linear, ops.gate, ops.add_norm

    def add_norm(self, x: Tensor, more: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        if weight is NO_NORM:
            x = x + more
            return x, x
        return self._add_norm(x, more, weight, epsilon)


def run_recomputing(
    weights: Weights, ids_R: Tensor, attend: Attend, ops: Ops, last_rows: Tensor
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """As `layers.run`: (hidden states of `last_rows`, the backward pass, which takes their gradient)."""
    stretches = [_stretch(weights, i, attend, StretchOps(ops), last_rows) for i in range(len(weights.layers))]
    with torch.no_grad():
        streams = [weights.embed_VH[ids_R] * weights.architecture.embed_scale]
        for stretch in stretches:
            streams.append(stretch(streams[-1]))
    h_PH = streams.pop()

    def backward(d: Tensor) -> None:
        for i in reversed(range(len(stretches))):
            with torch.enable_grad():
                # The embeddings need no gradient.
                x_RH = streams.pop().requires_grad_(i > 0)
                y = stretches[i](x_RH)
            if not y.requires_grad:
                return  # no adapter from here down
            torch.autograd.backward(y, d)
            if x_RH.grad is None:
                return
            d = x_RH.grad

    return h_PH, backward


def _stretch(weights: Weights, i: int, attend: Attend, ops: Ops, last_rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Layer `i` alone: residual stream to residual stream, or of the last one to the final hidden states."""
    last = i == len(weights.layers) - 1
    alone = replace(weights.architecture, embed_scale=1.0)

    def attend_alone(_: int, q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor) -> Tensor:
        return attend(i, q_RHD, k_RKD, v_RKD)

    def compute(x_RH: Tensor) -> Tensor:
        layer = replace(
            weights,
            architecture=alone,
            embed_VH=x_RH,
            layers=weights.layers[i : i + 1],
            norm=weights.norm if last else NO_NORM,
        )
        rows = torch.arange(len(x_RH), device=x_RH.device)
        return run(layer, rows, attend_alone, ops, last_rows if last else None)

    return compute
