"""Attention with rotary positions, in torch: over whole prompts, and of new tokens over the cache.

The decode part is the twin that `kernels.c` and the CUDA kernel are tested against, and what runs where neither can.
Scores are scaled, then capped, then masked: a token sees itself and what stands before it, up to its layer's window.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewardsmith.rollout.fast.cache import PAGE, Cache
from rewardsmith.rollout.model.architecture import Architecture

_BLOCK = 512  # rows whose scores are in memory at once, where they have to be


@dataclass
class Rows:
    """The sequences of one decode step, N of them; those of one prompt stand side by side.

    `slot_N` is a sequence's line in `Tables.own_pages_SM`, `group_N` its prompt's in `Tables.prompt_pages_GM`.
    `length_N` counts the tokens sampled so far; the last of them, `last_N`, is the one to be fed.
    """

    slot_N: Tensor
    group_N: Tensor
    length_N: Tensor
    limit_N: Tensor
    last_N: Tensor
    seed_N: Tensor
    temperature_N: Tensor

    def select(self, index: Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    def joined(self, other: Self) -> Self:
        return type(self)(*(torch.cat([getattr(rows, field.name) for rows in (self, other)]) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.slot_N)


@dataclass
class Tables:
    """Which pages hold what: a sequence's own tokens by slot, prompts by group; places beyond the last page are 0."""

    own_pages_SM: Tensor
    prompt_pages_GM: Tensor
    prompt_length_G: Tensor


class Rotary:
    """Sine and cosine by layer and position, in float32 as transformers computes them, made as far as needed."""

    def __init__(self, architecture: Architecture, like: Tensor) -> None:
        self._ropes = [kind.rope for kind in architecture.layers]
        self._like = like
        self._positions = 0
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, positions: int) -> None:
        if positions <= self._positions:
            return
        self._positions = max(positions, 2 * self._positions)
        wide = torch.promote_types(self._like.dtype, torch.float32)
        position_P1 = torch.arange(self._positions, device=self._like.device).float()[:, None]
        for rope in {id(rope): rope for rope in self._ropes}.values():
            angles_PF = position_P1 * rope.inv_freq_F.to(self._like.device)
            self._tables[id(rope)] = (
                (angles_PF.cos() * rope.scaling).to(wide),
                (angles_PF.sin() * rope.scaling).to(wide),
            )

    def tables(self, layer: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), positions x F, up to what was reserved at least."""
        return self._tables[id(self._ropes[layer])]

    def rotate(self, layer: int, x_NHD: Tensor, position_N: Tensor) -> Tensor:
        """Numbers i and F + i of each head turned; those from 2 F on stay."""
        cos_N1F, sin_N1F = (table_PF[position_N][:, None] for table_PF in self.tables(layer))
        turned = cos_N1F.shape[-1]
        first, second, rest = torch.split(x_NHD, [turned, turned, x_NHD.shape[-1] - 2 * turned], -1)
        parts = [first * cos_N1F - second * sin_N1F, second * cos_N1F + first * sin_N1F, rest]
        return torch.cat(parts, -1).to(x_NHD.dtype)


def causal_attention(architecture: Architecture, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    """Of one whole sequence, positions turned already: T x H x D."""
    window, cap, scale = architecture.layers[layer].window, architecture.attention_softcap, architecture.attention_scale
    q_HTD, k_KTD, v_KTD = (x.transpose(0, 1) for x in (q_THD, k_TKD, v_TKD))
    length = q_HTD.shape[1]
    if cap is None and (window is None or window >= length):
        whole_HTD = scaled_dot_product_attention(
            q_HTD[None], k_KTD[None], v_KTD[None], is_causal=True, scale=scale, enable_gqa=True
        )[0]
        return whole_HTD.transpose(0, 1)
    out_HTD = torch.empty_like(q_HTD)
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        ahead_TC = torch.arange(start, end, device=q_HTD.device)[:, None] - torch.arange(
            first, end, device=q_HTD.device
        )
        seen_TC = (ahead_TC >= 0) & (ahead_TC < (window or length))
        out_HTD[:, start:end] = _attend(
            q_HTD[:, start:end], k_KTD[:, first:end], v_KTD[:, first:end], seen_TC, scale, cap
        )
    return out_HTD.transpose(0, 1)


def _attend(q_HTD: Tensor, k_KCD: Tensor, v_KCD: Tensor, seen_TC: Tensor, scale: float, cap: float | None) -> Tensor:
    """Softmax attention by its formula, several query heads to each kv head; any dimensions may stand in front."""
    kv_heads, wide = k_KCD.shape[-3], torch.promote_types(q_HTD.dtype, torch.float32)
    q_KGTD = torch.unflatten(q_HTD, -3, (kv_heads, -1))
    scores_KGTC = (q_KGTD @ k_KCD.transpose(-1, -2).unsqueeze(-3)).to(wide) * scale
    if cap is not None:
        scores_KGTC = (scores_KGTC / cap).tanh() * cap
    weights_KGTC = scores_KGTC.masked_fill(~seen_TC, -torch.inf).softmax(-1)
    mixed_KGTD: Tensor = weights_KGTC.to(v_KCD.dtype) @ v_KCD.unsqueeze(-3)
    return mixed_KGTD.flatten(-4, -3)


def store_prompts(cache: Cache, layer: int, page_N: Tensor, offset_N: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> None:
    """Keys (positions turned) and values of tokens into their pages."""
    cache.keys[layer][page_N, :, :, offset_N] = k_NKD
    cache.values[layer][page_N, :, offset_N, : v_NKD.shape[-1]] = v_NKD


def decode_attention(
    architecture: Architecture,
    rotary: Rotary,
    cache: Cache,
    tables: Tables,
    rows: Rows,
    layer: int,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
) -> Tensor:
    """One new token per row: its key and value go into its pages, it attends to prompt and own tokens. N x H x D."""
    own_N, prompt_N = rows.length_N - 1, tables.prompt_length_G[rows.group_N]
    position_N = prompt_N + own_N
    own_pages_NM = tables.own_pages_SM[rows.slot_N, : int(own_N.max()) // PAGE + 1]
    prompt_pages_NM = tables.prompt_pages_GM[rows.group_N, : -(-int(prompt_N.max()) // PAGE)]
    page_N = own_pages_NM.gather(1, own_N[:, None] // PAGE).squeeze(1)
    store_prompts(cache, layer, page_N, own_N % PAGE, rotary.rotate(layer, k_NKD, position_N), v_NKD)

    pages_NM = torch.cat([prompt_pages_NM, own_pages_NM], 1)
    at_T = torch.arange(pages_NM.shape[1] * PAGE, device=q_NHD.device)
    prompt_width = prompt_pages_NM.shape[1] * PAGE
    in_prompt_NT = at_T < prompt_N[:, None]
    own_at_T = at_T - prompt_width
    in_own_NT = (own_at_T >= 0) & (own_at_T <= own_N[:, None])
    seen_NT = in_prompt_NT | in_own_NT
    window = architecture.layers[layer].window
    if window is not None:
        at_NT = torch.where(at_T < prompt_width, at_T, prompt_N[:, None] + own_at_T)
        seen_NT &= at_NT > position_N[:, None] - window

    scale, cap = architecture.attention_scale, architecture.attention_softcap
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    # Page by page as they lie: to bring them in another order costs more than the products. P is the place in a page.
    seen_NMP = torch.unflatten(seen_NT, 1, (-1, PAGE))
    q_NKGD = torch.unflatten(rotary.rotate(layer, q_NHD, position_N), 1, (architecture.kv_heads, -1))
    scores_NMKGP = (q_NKGD[:, None] @ cache.keys[layer][pages_NM]).to(wide) * scale
    if cap is not None:
        scores_NMKGP = (scores_NMKGP / cap).tanh() * cap
    scores_NMKGP.masked_fill_(~seen_NMP[:, :, None, None], -torch.inf)
    weights_NKGT = scores_NMKGP.permute(0, 2, 3, 1, 4).flatten(3).softmax(-1).to(q_NHD.dtype)
    weights_NMKGP = torch.unflatten(weights_NKGT, 3, (-1, PAGE)).permute(0, 3, 1, 2, 4)
    # Pages hold what was there before; a weight of zero times no number would be no number.
    values_NMKPD = cache.values[layer][pages_NM].masked_fill_(~seen_NMP[:, :, None, :, None], 0)
    out_NKGD: Tensor = (weights_NMKGP @ values_NMKPD).sum(1)
    return out_NKGD.flatten(1, 2)[..., : architecture.head_dim]
