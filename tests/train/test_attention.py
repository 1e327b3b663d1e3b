"""Packed attention with a shared prompt against one dense mask, forward and backward, in float64."""

from dataclasses import replace

import pytest
import torch
from reference_attention import reference_attend
from tiny_models import random_model

from rewardsmith.rollout.model.architecture import Architecture, LayerKind, Rope, describe
from rewardsmith.train.batch import Example
from rewardsmith.train.fast import attention
from rewardsmith.train.fast.attention import PackedAttention
from rewardsmith.train.fast.packed import Pack, pack

# (prompt, completions): a long group, one-token completions, a group of one, a prompt of one token.
GROUPS = (([1, 2, 3, 4, 5], (9, 30, 1, 4, 4)), ([6], (2, 1)), ([7, 8], (12,)), ([9, 9, 9], (1,)))


def packed(groups=GROUPS) -> Pack:
    examples = [Example(prompt, [1] * n, 1.0, 1.0, [0.0] * n) for prompt, lengths in groups for n in lengths]
    return pack(examples, range(len(examples)))


def architecture(
    window: int | None = None, softcap: float | None = None, turned: int = 4, kv_heads: int = 2
) -> Architecture:
    rope = Rope(10.0 ** -torch.arange(turned), 1.1)
    return replace(
        describe(random_model("llama")),
        heads=4,
        kv_heads=kv_heads,
        head_dim=8,
        attention_scale=0.7,
        attention_softcap=softcap,
        layers=(LayerKind(rope, window),),
    )


def joined(made: Pack) -> torch.Tensor:
    """Which rows are of one sequence: a completion's own, and its prompt's."""
    joined_RR = torch.zeros(len(made.ids_R), len(made.ids_R), dtype=torch.bool)
    for segment in made.segments:
        own = slice(segment.start, segment.stop)
        joined_RR[own, own] = True
        joined_RR[own, segment.prompt_start : segment.prompt_stop] = True
    return joined_RR


def both(shape: Architecture, made: Pack, dtype=torch.float64):
    """Outputs and gradients of q, k, v: packed ones, dense ones."""
    generator = torch.Generator().manual_seed(0)
    rows = len(made.ids_R)
    inputs = [
        torch.randn(rows, heads, shape.head_dim, generator=generator, dtype=dtype, requires_grad=True)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    d = torch.randn(rows, shape.heads, shape.head_dim, generator=generator, dtype=dtype)
    found = []
    for attend in (PackedAttention(shape, made, dtype), reference_attend(shape, made.positions_R, joined(made))):
        out = attend(0, *inputs)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, d)])
    return found


# Most scores of a tile, and what a tile costs: cut as far as can be, everything together, what is used.
@pytest.mark.parametrize(("limit", "cost"), [(1, 1), (300, 2**20), (2**18, 1), (2**18, 2**20), (2**18, 2**14)])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 20])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_it_is_dense_attention(
    limit: int, cost: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(attention.TILE_NUMBERS, "cpu", limit)
    monkeypatch.setitem(attention.TILE_COST, "cpu", cost)
    monkeypatch.setattr(attention, "FEWEST_ROWS", 3)
    for ours, dense in zip(*both(architecture(window, softcap), packed()), strict=True):
        assert torch.allclose(ours, dense, atol=1e-12, rtol=0)


@pytest.mark.parametrize("turned", [1, 3, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_partial_rotation_and_shared_key_heads(turned: int, kv_heads: int):
    for ours, dense in zip(*both(architecture(turned=turned, kv_heads=kv_heads), packed()), strict=True):
        assert torch.allclose(ours, dense, atol=1e-12, rtol=0)


def test_layers_of_different_windows_share_their_scratch():
    rope = Rope(10.0 ** -torch.arange(4))
    shape = replace(architecture(), layers=(LayerKind(rope, 2), LayerKind(rope, None)))
    made = packed()
    attend, dense = PackedAttention(shape, made, torch.float64), reference_attend(shape, made.positions_R, joined(made))
    q, k, v = (torch.randn(len(made.ids_R), heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    for index in (0, 1, 0):
        assert torch.allclose(attend(index, q, k, v), dense(index, q, k, v), atol=1e-12, rtol=0)


def test_tiles_cover_every_row_once_and_stay_small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "FEWEST_ROWS", 2)
    segments = packed([([1] * 40, (100, 7, 5, 300)), ([2], (3, 4))]).segments
    tiles = attention.divided(segments, limit=1000, cost=400)
    spans = [(tile[0].start, tile[-1].stop) for tile in tiles]
    assert [start for start, _ in spans[1:]] == [stop for _, stop in spans[:-1]]
    assert (spans[0][0], spans[-1][1]) == (0, segments[-1].stop)
    for window in (None, 10):
        made = [attention.tile_of(tile, window, torch.float32, torch.device("cpu")) for tile in tiles]
        # Two rows are the fewest, however many keys they see.
        assert all(tile.numbers <= 1000 or tile.stop - tile.start == 2 for tile in made)
    assert max(tile.numbers / (tile.stop - tile.start) for tile in made) < 10 + 30  # no keys before the window


def test_long_completions_are_cut_and_short_ones_computed_together():
    def rows(lengths: tuple[int, ...]) -> list[list[int]]:
        segments = packed([([1] * 40, lengths)]).segments
        return [[s.stop - s.start for s in tile] for tile in attention.divided(segments, limit=2**16, cost=800)]

    # 40 rows at a time cost as much by themselves as by what the mask hides.
    assert rows((121,)) == [[40], [40], [40], [40]]
    assert rows((151,)) == [[40], [38], [38], [38], [36]]
    # 2 * 19 * 19 hidden scores are less than a tile costs, 2 * 19 * 30 are more; a prompt stands alone.
    assert rows((20, 20)) == [[40], [19, 19]]
    assert rows((20, 31)) == [[40], [19], [30]]
    assert rows((2, 2, 2, 1, 2)) == [[40], [1, 1, 1, 1]]


def test_float32_is_close_and_nothing_is_kept_without_gradient():
    made, shape = packed(), architecture()
    for ours, dense in zip(*both(shape, made, torch.float32), strict=True):
        assert torch.allclose(ours, dense, atol=1e-4)
    q, k, v = (torch.randn(len(made.ids_R), heads, 8, requires_grad=True) for heads in (4, 2, 2))
    with torch.no_grad():
        assert PackedAttention(shape, made, torch.float32)(0, q, k, v).grad_fn is None


@pytest.mark.parametrize("softcap", [None, 80.0])
def test_in_16_bits_large_scores_are_not_rounded(softcap: float | None):
    """Against dense attention in float64 on the same numbers, with positions that change none of them."""
    made, narrow = packed(), torch.bfloat16
    unturned = LayerKind(Rope(torch.zeros(4), 1.0), None)
    shape = replace(architecture(softcap=softcap), layers=(unturned,), attention_scale=0.5)
    generator = torch.Generator().manual_seed(0)
    inputs = [(8 * torch.randn(len(made.ids_R), heads, 8, generator=generator)).to(narrow) for heads in (4, 2, 2)]
    d = torch.randn(len(made.ids_R), 4, 8, generator=generator).to(narrow)
    found = []
    for dtype, attend in (
        (narrow, PackedAttention(shape, made, narrow)),
        (torch.float64, reference_attend(shape, made.positions_R, joined(made))),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = attend(0, *leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, d.to(dtype))])
        assert all(x.dtype == dtype for x in found[-1])
    errors = [float((ours.double() - dense).norm() / dense.norm()) for ours, dense in zip(*found, strict=True)]
    assert errors[0] < 0.003 and max(errors) < 0.02


def test_in_16_bits_positions_are_turned_in_float32_and_rounded_once():
    positions = torch.arange(500)
    x = torch.randn(500, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    rope = Rope(10.0 ** -torch.arange(3), 1.1)
    for back in (False, True):
        turns = attention.turns(rope, positions, torch.float32)
        found = attention.rotate(x, turns, torch.empty_like(x), 0.3, back)
        exact = attention.rotate(x.float(), turns, torch.empty(x.shape), 0.3, back)
        assert torch.equal(found, exact.bfloat16())
