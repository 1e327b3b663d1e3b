"""Attention of packed rows, exact, with a backward of its own: completions see their prompt, which is there only once.

Rows are computed in tiles: some rows of one or more completions of a group (or of a prompt) with all keys that any of
them sees, the prompt's first, then each completion's own. Products with the prompt's keys are one for all rows of a
tile, those with own keys one per completion; nothing is padded but own columns of the shorter completions. Probabilities
are computed again in the backward pass. Query heads that share a key head are rows of one product. A tile is never
larger than `TILE_NUMBERS`, so memory does not grow with the square of the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rewardsmith.rollout.architecture import Architecture, Rope
from rewardsmith.train.packed import Pack, Segment

# Scores of a tile: what stays in a core's own cache, and on a GPU what keeps it busy.
TILE_NUMBERS = {"cpu": 2**18, "cuda": 2**26}
FEWEST_ROWS = 16  # of a tile; fewer would make its products slow


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of one completion or prompt, and which of its own keys they see."""

    start: int
    stop: int
    first_key: int
    last_key: int

    @property
    def keys(self) -> int:
        return self.last_key - self.first_key


@dataclass(frozen=True)
class Tile:
    """Adjacent `pieces` that see the prompt rows `prompt_start` to `prompt_stop`.

    `hidden_MC` is added to the last C columns of the M rows' scores: -inf where a row must not see a key.
    """

    pieces: list[Piece]
    prompt_start: int
    prompt_stop: int
    hidden_MC: Tensor

    @property
    def start(self) -> int:
        return self.pieces[0].start

    @property
    def stop(self) -> int:
        return self.pieces[-1].stop

    @property
    def prompt(self) -> int:
        return self.prompt_stop - self.prompt_start

    @property
    def columns(self) -> int:
        return self.prompt + max(piece.keys for piece in self.pieces)


class PackedAttention:
    """`layers.Attend` for the rows of one pack, which are R of H heads; with or without gradient."""

    def __init__(self, architecture: Architecture, pack: Pack, dtype: torch.dtype) -> None:
        self.architecture = architecture
        device = pack.ids_R.device
        limit = TILE_NUMBERS["cpu" if device.type == "cpu" else "cuda"] // architecture.heads
        windows = {kind.window for kind in architecture.layers}
        self._tiles = {window: make_tiles(pack.segments, window, limit, dtype, device) for window in windows}
        self._turns = {kind.rope: turns(kind.rope, pack.positions_R, dtype) for kind in architecture.layers}
        tiles = [tile for window in self._tiles for tile in self._tiles[window]]
        self._largest = max((tile.stop - tile.start) * tile.columns for tile in tiles) * architecture.heads
        self._scratch: dict[int, Tensor] = {}

    def __call__(self, index: int, q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor) -> Tensor:
        return _Attention.apply(q_RHD, k_RKD, v_RKD, self, index)

    def tiles(self, index: int) -> list[Tile]:
        """Of the layer numbered `index`."""
        return self._tiles[self.architecture.layers[index].window]

    def turns(self, index: int) -> tuple[Tensor, Tensor]:
        return self._turns[self.architecture.layers[index].rope]

    def scratch(self, number: int, tile: Tile, like: Tensor) -> Tensor:
        """Room for a tile's scores, the same memory for all tiles and layers: key heads x rows of all heads x columns."""
        if number not in self._scratch:
            self._scratch[number] = like.new_empty(self._largest)
        heads = self.architecture.kv_heads
        rows = (tile.stop - tile.start) * self.architecture.heads // heads
        return self._scratch[number][: heads * rows * tile.columns].view(heads, rows, tile.columns)


def turns(rope: Rope, positions_R: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rows' angles, R x 1 x F. In float32 first, as models compute them in training."""
    angles_R1F = positions_R[:, None, None].float() * rope.inv_freq_F.to(positions_R.device)
    return (angles_R1F.cos() * rope.scaling).to(dtype), (angles_R1F.sin() * rope.scaling).to(dtype)


def make_tiles(
    segments: Sequence[Segment], window: int | None, limit: int, dtype: torch.dtype, device: torch.device
) -> list[Tile]:
    """Tiles of all rows: of at most `limit` rows times columns where `FEWEST_ROWS` allow it.

    `segments` are in the order of their rows. With a window a row sees that many tokens, itself included.
    """
    tiles: list[Tile] = []
    together: list[Segment] = []

    def finish() -> None:
        if together:
            tiles.append(
                _tile(together[0], [_piece(s, 0, s.stop - s.start, window) for s in together], window, dtype, device)
            )
            together.clear()

    for segment in segments:
        length = segment.stop - segment.start
        columns = segment.prompt_length + max(s.stop - s.start for s in [*together, segment])
        same_prompt = bool(together) and (together[0].prompt_start, together[0].prompt_stop) == (
            segment.prompt_start,
            segment.prompt_stop,
        )
        if not same_prompt or (segment.stop - together[0].start) * columns > limit:
            finish()
        if length * (segment.prompt_length + length) <= limit:
            together.append(segment)
            continue
        first = 0
        while first < length:
            # As many rows as fit: rows * (prompt + first + rows) = limit.
            before = (segment.prompt_length + first) / 2
            rows = max(int((before * before + limit) ** 0.5 - before), FEWEST_ROWS)
            last = min(first + rows, length)
            tiles.append(_tile(segment, [_piece(segment, first, last, window)], window, dtype, device))
            first = last
    finish()
    return tiles


def _piece(segment: Segment, first: int, last: int, window: int | None) -> Piece:
    """Rows `first` to `last` of a segment; its earliest row sees the most distant key."""
    first_key = 0 if window is None else max(0, first - window + 1)
    start = segment.start
    return Piece(start + first, start + last, start + first_key, start + last)


def _tile(segment: Segment, pieces: list[Piece], window: int | None, dtype: torch.dtype, device: torch.device) -> Tile:
    # The first row of the first piece is as early in its sequence as that of any other.
    earliest = segment.prompt_length + pieces[0].start - segment.start
    prompt_start = segment.prompt_start
    if window is not None:
        prompt_start = min(prompt_start + max(0, earliest - window + 1), segment.prompt_stop)
    prompt = segment.prompt_stop - prompt_start
    own = max(piece.keys for piece in pieces)
    hidden = []
    for piece in pieces:
        row = torch.arange(piece.start, piece.stop)[:, None]
        key = torch.arange(piece.first_key, piece.first_key + own)
        hidden_MC = (key > row) | (key >= piece.last_key)
        if window is not None:
            # How far back: over a completion's own rows, then from its first row over the prompt's.
            first_row = segment.start if len(pieces) == 1 else piece.start
            to_prompt = row - first_row + segment.prompt_stop - torch.arange(prompt_start, segment.prompt_stop)
            hidden_MC = torch.cat([to_prompt >= window, hidden_MC | (row - key >= window)], 1)
        hidden.append(hidden_MC)
    hidden_MC = torch.cat(hidden)
    bias_MC = torch.zeros(hidden_MC.shape, dtype=dtype).masked_fill_(hidden_MC, -torch.inf)
    return Tile(pieces, prompt_start, segment.prompt_stop, bias_MC.to(device))


def rotate(x: Tensor, turns: tuple[Tensor, Tensor], out: Tensor, scale: float = 1.0, back: bool = False) -> Tensor:
    """`x` turned by rotary positions, times `scale`, into `out`. Number i of a head turns with number i + F, i < F."""
    cos, sin = turns
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
            probs = _probabilities(q_KRGD, k_KRD, tile, attention)[0]
            part = _values(probs, v_KRD, tile)
            _by_key_head(out_RHD, len(k_KRD))[:, tile.start : tile.stop].copy_(part.unflatten(1, (-1, q_KRGD.shape[2])))
        ctx.save_for_backward(q_KRGD, k_KRD, v_KRD, out_RHD)
        ctx.attention, ctx.index = attention, index
        return out_RHD

    @staticmethod
    def backward(ctx: Any, d_RHD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_KRGD, k_KRD, v_KRD, out_RHD = ctx.saved_tensors
        attention, index = ctx.attention, ctx.index
        kv_heads, rows, _, size = q_KRGD.shape
        # What the softmax takes off the gradients of a row's probabilities: their mean under these.
        mean_RH1 = (d_RHD * out_RHD).sum(-1, keepdim=True)
        mean_KRG1 = _by_key_head(mean_RH1, kv_heads).contiguous()
        d_KRGD = _by_key_head(d_RHD, kv_heads).contiguous()
        dq_KRGD = torch.empty_like(q_KRGD)
        dk_KRD, dv_KRD = torch.zeros_like(k_KRD), torch.zeros_like(v_KRD)
        for tile in attention.tiles(index):
            probs, slope = _probabilities(q_KRGD, k_KRD, tile, attention)
            d_KMD, q_KMD = _rows(d_KRGD, tile), _rows(q_KRGD, tile)
            scores = _products(d_KRGD, v_KRD, tile, attention.scratch(0, tile, d_KRGD), filler=0.0)
            scores.sub_(_rows(mean_KRG1, tile)).mul_(probs)
            if slope is not None:
                scores.mul_(slope)
            _add_to_keys(dv_KRD, probs, d_KMD, tile)
            _add_to_keys(dk_KRD, scores, q_KMD, tile)
            _rows(dq_KRGD, tile).copy_(_values(scores, k_KRD, tile))
        turned, scale = attention.turns(index), attention.architecture.attention_scale
        dq_RHD = torch.empty_like(out_RHD)
        rotate(dq_KRGD, turned, _by_key_head(dq_RHD, kv_heads), scale, back=True)
        dk_RKD = rotate(dk_KRD.transpose(0, 1), turned, dk_KRD.new_empty(rows, kv_heads, size), back=True)
        return dq_RHD, dk_RKD, dv_KRD.transpose(0, 1), None, None


def _by_key_head(x_RHD: Tensor, kv_heads: int) -> Tensor:
    """K x R x G x D, a view."""
    return x_RHD.unflatten(1, (kv_heads, -1)).transpose(0, 1)


def _rows(x_KRGD: Tensor, part: Tile | Piece) -> Tensor:
    """The part's rows of all heads, K x M * G x D, a view."""
    return x_KRGD[:, part.start : part.stop].flatten(1, 2)


def _own(scores: Tensor, tile: Tile, piece: Piece) -> Tensor:
    """Those of a tile's scores that are of a piece's rows and its own keys."""
    group = scores.shape[1] // (tile.stop - tile.start)
    rows = slice((piece.start - tile.start) * group, (piece.stop - tile.start) * group)
    return scores[:, rows, tile.prompt : tile.prompt + piece.keys]


def _products(x_KRGD: Tensor, keys_KRD: Tensor, tile: Tile, out: Tensor, filler: float) -> Tensor:
    """Of the tile's rows with the keys each may see; `filler` where there are none."""
    if tile.prompt:
        prompt_KPD = keys_KRD[:, tile.prompt_start : tile.prompt_stop]
        torch.bmm(_rows(x_KRGD, tile), prompt_KPD.mT, out=out[..., : tile.prompt])
    group = x_KRGD.shape[2]
    for piece in tile.pieces:
        torch.bmm(_rows(x_KRGD, piece), keys_KRD[:, piece.first_key : piece.last_key].mT, out=_own(out, tile, piece))
        if tile.prompt + piece.keys < tile.columns:
            rows = slice((piece.start - tile.start) * group, (piece.stop - tile.start) * group)
            out[:, rows, tile.prompt + piece.keys :] = filler
    return out


def _probabilities(
    q_KRGD: Tensor, k_KRD: Tensor, tile: Tile, attention: PackedAttention
) -> tuple[Tensor, Tensor | None]:
    """(probabilities, d softcapped score / d score or None)."""
    scores = _products(q_KRGD, k_KRD, tile, attention.scratch(0, tile, q_KRGD), filler=0.0)
    cap, slope = attention.architecture.attention_softcap, None
    if cap is not None:
        scores.div_(cap).tanh_()
        slope = torch.mul(scores, scores, out=attention.scratch(2, tile, q_KRGD)).neg_().add_(1)
        scores.mul_(cap)
    hidden_M1C = tile.hidden_MC[:, None]
    scores.unflatten(1, (len(hidden_M1C), -1))[..., -hidden_M1C.shape[-1] :].add_(hidden_M1C)
    return torch.softmax(scores, -1, out=attention.scratch(1, tile, q_KRGD)), slope


def _values(weights: Tensor, values_KRD: Tensor, tile: Tile) -> Tensor:
    """Sums over keys, K x M * G x D, weighted by what stands in the rows of `weights`."""
    prompt_KPD = values_KRD[:, tile.prompt_start : tile.prompt_stop]
    sums = torch.bmm(weights[..., : tile.prompt], prompt_KPD) if tile.prompt else None
    if sums is None:
        sums = weights.new_zeros(*weights.shape[:2], values_KRD.shape[-1])
    group = weights.shape[1] // (tile.stop - tile.start)
    for piece in tile.pieces:
        rows = slice((piece.start - tile.start) * group, (piece.stop - tile.start) * group)
        sums[:, rows].baddbmm_(_own(weights, tile, piece), values_KRD[:, piece.first_key : piece.last_key])
    return sums


def _add_to_keys(total_KRD: Tensor, weights: Tensor, x_KMD: Tensor, tile: Tile) -> None:
    """Adds to each key its sum over the tile's rows, weighted by what stands in its column."""
    if tile.prompt:
        total_KRD[:, tile.prompt_start : tile.prompt_stop].baddbmm_(weights[..., : tile.prompt].mT, x_KMD)
    group = weights.shape[1] // (tile.stop - tile.start)
    for piece in tile.pieces:
        rows = slice((piece.start - tile.start) * group, (piece.stop - tile.start) * group)
        total_KRD[:, piece.first_key : piece.last_key].baddbmm_(_own(weights, tile, piece).mT, x_KMD[:, rows])
