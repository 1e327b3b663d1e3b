"""Attention of packed rows, exact, with a backward of its own: completions see their prompt, which is there only once.

Rows are computed in tiles: adjacent rows of a prompt or of completions of one prompt, with all keys that any of them
sees, the prompt's first and then their own; a mask hides what one row must not see of the others. Probabilities are
computed again in the backward pass. Query heads that share a key head are rows of one product. No tile has more scores
than `TILE_NUMBERS`, so memory does not grow with the square of the length. Of a model in 16 bits, positions are turned
and scores and probabilities kept in float32, as its sampler has them; only what goes into a product is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rewardsmith.rollout.model.architecture import Architecture, Rope
from rewardsmith.train.fast.packed import Pack, Segment

# Scores of a tile: what stays in a core's own cache, and on a GPU what keeps it busy.
TILE_NUMBERS = {"cpu": 2**18, "cuda": 2**26}
# Scores that take as long as it takes to begin one more tile, on all of a model's heads.
TILE_COST = {"cpu": 2**14, "cuda": 2**22}
FEWEST_ROWS = 16  # of a tile; fewer would make its products slow


@dataclass(frozen=True)
class Tile:
    """Rows `start` to `stop` and the keys they see: the prompt's from `prompt_start` on, their own from `first_key` on.

    `hidden_MC` is added to the last C columns of the M rows' scores: -inf where a row must not see a key.
    """

    start: int
    stop: int
    prompt_start: int
    prompt_stop: int
    first_key: int
    hidden_MC: Tensor

    @property
    def prompt(self) -> int:
        return self.prompt_stop - self.prompt_start

    @property
    def numbers(self) -> int:
        """Scores of one head."""
        return (self.stop - self.start) * (self.prompt + self.stop - self.first_key)


class PackedAttention:
    """`layers.Attend` for the rows of one pack, which are R of H heads; with or without gradient."""

    def __init__(self, architecture: Architecture, pack: Pack, dtype: torch.dtype) -> None:
        self.architecture = architecture
        self.wide = wide = torch.promote_types(dtype, torch.float32)
        device = pack.ids_R.device
        kind = "cpu" if device.type == "cpu" else "cuda"
        limit, cost = (number / architecture.heads for number in (TILE_NUMBERS[kind], TILE_COST[kind]))
        self._tiles = {
            window: [tile_of(rows, window, wide, device) for rows in divided(pack.segments, limit, cost)]
            for window in {layer.window for layer in architecture.layers}
        }
        self._turns = {layer.rope: turns(layer.rope, pack.positions_R, wide) for layer in architecture.layers}
        self._largest = max(tile.numbers for tiles in self._tiles.values() for tile in tiles) * architecture.heads
        self._scratch: dict[int, Tensor] = {}

    def __call__(self, index: int, q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor) -> Tensor:
        out_RHD: Tensor = _Attention.apply(q_RHD, k_RKD, v_RKD, self, index)  # type: ignore[no-untyped-call]
        return out_RHD

    def tiles(self, index: int) -> list[Tile]:
        """Of the layer numbered `index`."""
        return self._tiles[self.architecture.layers[index].window]

    def turns(self, index: int) -> tuple[Tensor, Tensor]:
        return self._turns[self.architecture.layers[index].rope]

    def scratch(self, number: int, tile: Tile, like: Tensor) -> Tensor:
        """Room for a tile's scores, key heads x rows of all heads x columns: the same for all tiles and layers."""
        if number not in self._scratch:
            self._scratch[number] = like.new_empty(self._largest, dtype=self.wide)
        heads, group = self.architecture.kv_heads, self.architecture.heads // self.architecture.kv_heads
        room = self._scratch[number][: self.architecture.heads * tile.numbers]
        return room.view(heads, group * (tile.stop - tile.start), -1)


def turns(rope: Rope, positions_R: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rows' angles, R x 1 x F. In float32 first, as models compute them in training."""
    angles_R1F = positions_R[:, None, None].float() * rope.inv_freq_F.to(positions_R.device)
    return (angles_R1F.cos() * rope.scaling).to(dtype), (angles_R1F.sin() * rope.scaling).to(dtype)


@dataclass(frozen=True)
class Stretch:
    """Rows `start` to `stop` of a segment."""

    segment: Segment
    start: int
    stop: int


def divided(segments: Sequence[Segment], limit: float, cost: float) -> list[list[Stretch]]:
    """The rows of each tile: one stretch of a segment, or whole completions of one prompt that follow one another.

    `limit` is the most scores of a tile and `cost` what a tile costs beside its scores, both for one head. Scores that
    the mask hides are computed for nothing: long segments are cut, short ones computed together, where it saves time.
    """
    tiles: list[list[Stretch]] = []
    for segment in segments:
        # With stretches of R rows, length / R tiles cost as much as the length * R / 2 scores that are hidden.
        stretches = _stretches(segment, max(sqrt(2 * cost), FEWEST_ROWS), limit)
        together = tiles[-1] if tiles else []
        if together and len(stretches) == 1 and _of_one_prompt(together[0], segment):
            rows, more = segment.start - together[0].start, segment.stop - segment.start
            if 2 * rows * more <= cost and (rows + more) * (segment.prompt_length + rows + more) <= limit:
                together += stretches
                continue
        tiles += [[stretch] for stretch in stretches]
    return tiles


def _of_one_prompt(first: Stretch, other: Segment) -> bool:
    """Whether both are completions of the same prompt, the first not cut."""
    one = first.segment
    whole = (first.start, first.stop) == (one.start, one.stop)
    same = (one.prompt_start, one.prompt_stop) == (other.prompt_start, other.prompt_stop)
    return whole and same and one.prompt_length > 0


def _stretches(segment: Segment, wanted: float, limit: float) -> list[Stretch]:
    """A segment in stretches of about `wanted` rows, of fewer where those would have more than `limit` scores."""
    length = segment.stop - segment.start
    even = ceil(length / max(1, round(length / wanted)))
    stretches, start = [], segment.start
    while start < segment.stop:
        before = (segment.prompt_length + start - segment.start) / 2
        most = int(sqrt(before * before + limit) - before)  # rows * (2 * before + rows) = limit
        stop = min(start + min(even, max(most, FEWEST_ROWS)), segment.stop)
        stretches.append(Stretch(segment, start, stop))
        start = stop
    return stretches


def tile_of(rows: Sequence[Stretch], window: int | None, dtype: torch.dtype, device: torch.device) -> Tile:
    """With a window a row sees that many tokens, itself included."""
    first, start, stop = rows[0].segment, rows[0].start, rows[-1].stop
    first_key, prompt_start = first.start, first.prompt_start
    row_M1 = torch.arange(start, stop)[:, None]
    # Where the completion of a row begins.
    begin_M1 = torch.tensor([s.segment.start for s in rows]).repeat_interleave(
        torch.tensor([s.stop - s.start for s in rows])
    )[:, None]
    if window is not None:
        first_key = max(first_key, start - window + 1)
        prompt_start = min(
            prompt_start + max(0, first.prompt_length + start - first.start - window + 1), first.prompt_stop
        )
    key_C = torch.arange(first_key, stop)
    hidden_MC = (key_C > row_M1) | (key_C < begin_M1)
    if window is not None:
        back_MP = row_M1 - begin_M1 + first.prompt_stop - torch.arange(prompt_start, first.prompt_stop)
        hidden_MC = torch.cat([back_MP >= window, hidden_MC | (row_M1 - key_C >= window)], 1)
    bias_MC = torch.zeros(hidden_MC.shape, dtype=dtype).masked_fill_(hidden_MC, -torch.inf)
    return Tile(start, stop, prompt_start, first.prompt_stop, first_key, bias_MC.to(device))


def rotate(x: Tensor, turns: tuple[Tensor, Tensor], out: Tensor, scale: float = 1.0, back: bool = False) -> Tensor:
    """`x` turned by rotary positions, times `scale`, into `out`. Number i of a head turns with number i + F, i < F.

    In the precision of `turns`, rounded once to that of `out`.
    """
    cos, sin = turns
    if out.dtype != cos.dtype:
        wide = torch.empty_like(out, dtype=cos.dtype)
        return out.copy_(rotate(x.to(cos.dtype), turns, wide, scale, back))
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    turned = cos.shape[-1]
    first, second = x[..., :turned], x[..., turned : 2 * turned]
    sign = -1 if back else 1
    torch.mul(first, cos, out=out[..., :turned]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., turned : 2 * turned]).addcmul_(first, sin, value=sign)
    if 2 * turned < x.shape[-1]:
        torch.mul(x[..., 2 * turned :], scale, out=out[..., 2 * turned :])
    return out


class _Attention(Function):
    """Heads come first inside: q as K x R x G x D, the G query heads that share a key head side by side."""

    @staticmethod
    def forward(
        ctx: Any, q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor, attention: PackedAttention, index: int
    ) -> Tensor:
        rows, heads, size = q_RHD.shape
        q_KRGD = _by_key_head(q_RHD, k_RKD.shape[1])
        turned, scale = attention.turns(index), attention.architecture.attention_scale
        q_KRGD = rotate(q_KRGD, turned, q_KRGD.new_empty(q_KRGD.shape), scale)
        k_KRD = rotate(k_RKD, turned, k_RKD.new_empty(k_RKD.shape[1], rows, size).transpose(0, 1)).transpose(0, 1)
        v_KRD = v_RKD.transpose(0, 1).contiguous()
        out_RHD = q_RHD.new_empty(rows, heads, size)
        for tile in attention.tiles(index):
            probs, _ = _probabilities(_rows(q_KRGD, tile), _seen(k_KRD, tile), tile, attention)
            out_KMD = probs.to(v_KRD.dtype) @ _seen(v_KRD, tile)
            _by_key_head(out_RHD, len(k_KRD))[:, tile.start : tile.stop] = torch.unflatten(
                out_KMD, 1, (-1, q_KRGD.shape[2])
            )
        ctx.save_for_backward(q_KRGD, k_KRD, v_KRD, out_RHD)
        ctx.attention, ctx.index = attention, index
        return out_RHD

    @staticmethod
    def backward(ctx: Any, d_RHD: Tensor) -> tuple[Tensor | None, ...]:
        q_KRGD, k_KRD, v_KRD, out_RHD = ctx.saved_tensors
        attention, index = ctx.attention, ctx.index
        kv_heads, rows, _, size = q_KRGD.shape
        narrow = q_KRGD.dtype
        # What the softmax takes off the gradients of a row's probabilities: their mean under these.
        mean_RH1 = (d_RHD.to(attention.wide) * out_RHD).sum(-1, keepdim=True)
        mean_KRG1 = _by_key_head(mean_RH1, kv_heads).contiguous()
        d_KRGD = _by_key_head(d_RHD, kv_heads).contiguous()
        dq_KRGD = torch.empty_like(q_KRGD)
        dk_KRD, dv_KRD = (torch.zeros_like(x, dtype=attention.wide) for x in (k_KRD, v_KRD))
        for tile in attention.tiles(index):
            q_KMD, d_KMD, k_KCD = _rows(q_KRGD, tile), _rows(d_KRGD, tile), _seen(k_KRD, tile)
            probs, slope = _probabilities(q_KMD, k_KCD, tile, attention)
            d_scores = _wide_product(d_KMD, _seen(v_KRD, tile), attention.scratch(0, tile, d_KMD))
            d_scores.sub_(_rows(mean_KRG1, tile)).mul_(probs)
            if slope is not None:
                d_scores.mul_(slope)
            probs, d_scores = probs.to(narrow), d_scores.to(narrow)
            _add(dv_KRD, probs.mT @ d_KMD, tile)
            _add(dk_KRD, d_scores.mT @ q_KMD, tile)
            torch.bmm(d_scores, k_KCD, out=_rows(dq_KRGD, tile))
        turned, scale = attention.turns(index), attention.architecture.attention_scale
        dq_RHD = torch.empty_like(out_RHD)
        rotate(dq_KRGD, turned, _by_key_head(dq_RHD, kv_heads), scale, back=True)
        dk_RKD = rotate(dk_KRD.transpose(0, 1), turned, k_KRD.new_empty(rows, kv_heads, size), back=True)
        return dq_RHD, dk_RKD, dv_KRD.to(narrow).transpose(0, 1), None, None


def _by_key_head(x_RHD: Tensor, kv_heads: int) -> Tensor:
    """K x R x G x D, a view."""
    return torch.unflatten(x_RHD, 1, (kv_heads, -1)).transpose(0, 1)


def _rows(x_KRGD: Tensor, tile: Tile) -> Tensor:
    """The tile's rows of all heads, K x M * G x D, a view."""
    return x_KRGD[:, tile.start : tile.stop].flatten(1, 2)


def _seen(x_KRD: Tensor, tile: Tile) -> Tensor:
    """The keys (or values) that the tile sees, the prompt's first."""
    own_KCD = x_KRD[:, tile.first_key : tile.stop]
    if not tile.prompt:
        return own_KCD
    return torch.cat([x_KRD[:, tile.prompt_start : tile.prompt_stop], own_KCD], 1)


def _add(total_KRD: Tensor, d_KCD: Tensor, tile: Tile) -> None:
    """Adds what comes back to the keys (or values) that the tile sees."""
    if tile.prompt:
        total_KRD[:, tile.prompt_start : tile.prompt_stop] += d_KCD[:, : tile.prompt]
    total_KRD[:, tile.first_key : tile.stop] += d_KCD[:, tile.prompt :]


def _wide_product(x_KMD: Tensor, y_KCD: Tensor, out: Tensor) -> Tensor:
    """x y^T into `out`, which may be wider than both: then the sums are not rounded to their precision."""
    if x_KMD.dtype == out.dtype:
        return torch.bmm(x_KMD, y_KCD.mT, out=out)
    if x_KMD.is_cuda:
        return torch.bmm(x_KMD, y_KCD.mT, out_dtype=out.dtype, out=out)
    return torch.bmm(x_KMD.to(out.dtype), y_KCD.mT.to(out.dtype), out=out)


def _probabilities(
    q_KMD: Tensor, k_KCD: Tensor, tile: Tile, attention: PackedAttention
) -> tuple[Tensor, Tensor | None]:
    """(probabilities, d softcapped score / d score or None)."""
    scores = _wide_product(q_KMD, k_KCD, attention.scratch(0, tile, q_KMD))
    cap, slope = attention.architecture.attention_softcap, None
    if cap is not None:
        scores.div_(cap).tanh_()
        slope = torch.mul(scores, scores, out=attention.scratch(2, tile, q_KMD)).neg_().add_(1)
        scores.mul_(cap)
    hidden_M1C = tile.hidden_MC[:, None]
    torch.unflatten(scores, 1, (len(hidden_M1C), -1))[..., -hidden_M1C.shape[-1] :].add_(hidden_M1C)
    return torch.softmax(scores, -1, out=attention.scratch(1, tile, q_KMD)), slope
