"""Attention as its formula says, over one dense mask: the measure for every faster way.

Rotary positions are computed in float32 as transformers does, everything else in the precision of what comes in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewardsmith.rollout.model.architecture import Architecture, Rope
from rewardsmith.rollout.model.layers import Attend, PlainOps, logits, run
from rewardsmith.rollout.model.weights import Weights


def reference_attend(architecture: Architecture, positions_N: Tensor, joined_NN: Tensor | None = None) -> Attend:
    """For packed rows at these positions. `joined_NN[i, j]`: row j belongs to a sequence that row i continues, whatever
    the positions say (default: all rows are one sequence). A completion row is joined with its prompt's and its own.
    """
    ahead_NN = positions_N[:, None] - positions_N[None, :]
    causal_NN = ahead_NN >= 0 if joined_NN is None else (ahead_NN >= 0) & joined_NN

    def attend(index: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        kind = architecture.layers[index]
        visible_NN = causal_NN if kind.window is None else causal_NN & (ahead_NN < kind.window)
        q_NHD, k_NKD = rotate(q_NHD, positions_N, kind.rope), rotate(k_NKD, positions_N, kind.rope)
        group = q_NHD.shape[1] // k_NKD.shape[1]
        k_NHD, v_NHD = k_NKD.repeat_interleave(group, 1), v_NKD.repeat_interleave(group, 1)
        scores_HNN = torch.einsum("ihd,jhd->hij", q_NHD, k_NHD) * architecture.attention_scale
        if architecture.attention_softcap is not None:
            scores_HNN = (scores_HNN / architecture.attention_softcap).tanh() * architecture.attention_softcap
        weights_HNN = scores_HNN.masked_fill(~visible_NN, -torch.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", weights_HNN, v_NHD)

    return attend


def rotate(x_NHD: Tensor, positions_N: Tensor, rope: Rope) -> Tensor:
    """Number i of a head turns with number i + F, for i < F; the numbers from 2 F on stay."""
    angles_NF = positions_N[:, None].float() * rope.inv_freq_F
    cos_N1F, sin_N1F = ((f(angles_NF) * rope.scaling).to(x_NHD.dtype)[:, None] for f in (torch.cos, torch.sin))
    turned = rope.inv_freq_F.numel()
    first, second, rest = x_NHD[..., :turned], x_NHD[..., turned : 2 * turned], x_NHD[..., 2 * turned :]
    return torch.cat([first * cos_N1F - second * sin_N1F, second * cos_N1F + first * sin_N1F, rest], -1)


def reference_logits(weights: Weights, ids: list[int], vocab: int | None = None) -> Tensor:
    """Logits after each of `ids`, one sequence: tokens x vocabulary."""
    positions_N = torch.arange(len(ids))
    attend = reference_attend(weights.architecture, positions_N)
    with torch.no_grad():
        h_NH = run(weights, torch.tensor(ids), attend, PlainOps())
        return logits(weights, h_NH, vocab if vocab is not None else len(weights.head_VH))
