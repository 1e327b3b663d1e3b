import math

import pytest
import torch

from rewardsmith.errors import ModelError
from rewardsmith.rollout import sampling
from rewardsmith.rollout.sampling import (
    Cut,
    GrowingSupport,
    Support,
    completion_seed,
    draw,
    inverse_cdf,
    log_probs,
    support,
    uniforms,
)


def evenly_spaced(count: int) -> torch.Tensor:
    """Uniforms with one in the middle of each of `count` equal stretches: counts follow a distribution exactly."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_uniforms_are_those_of_splitmix64():
    # The generator's first two outputs for seed 0, as published with it.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    seed = torch.tensor([0])
    assert [uniforms(seed, position).item() for position in (0, 1)] == [(x >> 11) * 2.0**-53 for x in published]


def test_each_row_may_have_a_position_of_its_own():
    seeds = torch.tensor([completion_seed(i) for i in range(50)])
    positions = torch.arange(50) * 331
    expected = [uniforms(seed[None], position)[0] for seed, position in zip(seeds, positions.tolist(), strict=True)]
    assert uniforms(seeds, positions).tolist() == [u.item() for u in expected]


def test_uniforms_fill_the_unit_interval_evenly():
    seeds = torch.tensor([completion_seed(0, 1, row, 0) for row in range(20_000)])
    for position in (0, 7):
        u = uniforms(seeds, position)
        assert u.min() >= 0 and u.max() < 1
        counts = torch.histc(u, bins=10, min=0, max=1)
        # 2000 expected, standard deviation 42
        assert (counts - 2000).abs().max() < 5 * 42
    assert torch.corrcoef(torch.stack([uniforms(seeds, 0), uniforms(seeds, 1)]))[0, 1].abs() < 0.03


def test_a_seed_depends_on_all_its_parts():
    names = [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4), (0, "eval", 2, 3), (0, 12, 3)]
    assert len({completion_seed(*parts) for parts in names}) == len(names)


def test_log_probs_scale_by_temperature_and_leave_padding_out():
    logits = torch.tensor([[1.0, 3.0, 2.0, 99.0]])
    expected = torch.tensor([[0.5, 1.5, 1.0]]).log_softmax(-1)
    assert torch.equal(log_probs(logits, 2.0, vocab=3), expected)
    both = log_probs(torch.cat([logits, logits]), torch.tensor([[2.0], [1.0]]), vocab=3)
    assert torch.equal(both, torch.cat([expected, logits[:, :3].log_softmax(-1)]))
    assert log_probs(logits.double(), 2.0, vocab=3).dtype == torch.float64


@pytest.mark.parametrize("size", [1, 3, 64, 65, 500])
def test_draws_follow_the_weights(size: int):
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(size, generator=generator)
    weights[torch.rand(size, generator=generator) < 0.3] = 0
    weights[size // 2] = 1.0
    count = 20_000
    drawn = inverse_cdf(weights.expand(count, -1), evenly_spaced(count))
    counts = torch.bincount(drawn, minlength=size)
    expected = count * weights.double() / weights.double().sum()
    assert (counts - expected).abs().max() <= 1.01
    assert counts[weights == 0].sum() == 0


def test_the_ends_of_the_unit_interval_draw_entries_with_weight():
    weights = torch.zeros(3, 200)
    weights[0, 70] = 1e-30
    weights[1, [3, 130]] = torch.tensor([1.0, 1e-20])
    weights[2, [0, 199]] = 1.0
    for u, expected in ((0.0, [70, 3, 0]), (1 - 2**-53, [70, 3, 199])):
        assert inverse_cdf(weights, torch.full((3,), u, dtype=torch.float64)).tolist() == expected


def test_top_k_keeps_the_k_likeliest():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    weights, ids = support(probs, Cut(top_k=2))
    assert ids.tolist() == [[1, 3]]
    assert torch.equal(weights, torch.tensor([[0.4, 0.3]]))


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(0, 0.4, {1}), (0, 0.41, {1, 3}), (0, 0.95, {0, 1, 2, 3}), (3, 0.5, {1, 3}), (2, 0.9, {1, 3}), (3, 0.4, {1})],
)
def test_top_p_keeps_the_smallest_set_that_holds_p_of_what_top_k_left(top_k: int, top_p: float, kept: set[int]):
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    weights, ids = support(probs, Cut(top_k, top_p))
    assert {i for i, weight in zip(ids[0].tolist(), weights[0].tolist(), strict=True) if weight} == kept


def test_top_p_looks_beyond_the_first_tokens_where_it_has_to():
    flat = torch.full((1, 300), 1 / 300)
    peaked = torch.cat([torch.tensor([0.9]), torch.full((299,), 0.1 / 299)])[None]
    weights, _ = support(torch.cat([flat, peaked]), Cut(top_p=0.5))
    assert (weights > 0).sum(-1).tolist() == [150, 1]


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        (Cut(min_p=0.24), {0, 1, 2, 3}),
        (Cut(min_p=0.26), {1, 2, 3}),
        (Cut(min_p=0.75), {1, 3}),
        (Cut(min_p=1.0), {1}),
        (Cut(top_k=3, min_p=0.6), {1, 3}),
        (Cut(top_p=0.8, min_p=0.1), {1, 2, 3}),  # top-p cuts more
    ],
)
def test_min_p_keeps_what_is_as_likely_as_that_share_of_the_likeliest(cut: Cut, kept: set[int]):
    weights, ids = support(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), cut)
    assert {i for i, weight in zip(ids[0].tolist(), weights[0].tolist(), strict=True) if weight} == kept


def test_min_p_looks_beyond_the_first_tokens_where_it_has_to():
    flat = torch.cat([torch.full((200,), 0.9 / 200), torch.full((100,), 0.1 / 100)])
    peaked = torch.cat([torch.tensor([0.9]), torch.full((299,), 0.1 / 299)])
    weights, _ = support(torch.stack([flat, peaked]), Cut(min_p=0.5))
    assert (weights > 0).sum(-1).tolist() == [200, 1]


def test_a_cut_draw_says_what_it_chose_from_and_how_likely_the_choice_was_there():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.05, 0.45]])
    drawn = draw(probs.log(), torch.tensor([0.0, 0.999]), Cut(top_k=3, min_p=0.6))
    assert drawn.ids_B.tolist() == [1, 3]
    assert drawn.support is not None and [row.tolist() for row in drawn.support] == [[1, 3], [3]]
    assert drawn.logps_B.tolist() == pytest.approx([math.log(4 / 7), 0.0], abs=1e-6)
    assert draw(probs.log(), torch.tensor([0.0, 0.5]), Cut()).support is None


def test_supports_are_kept_token_by_token():
    kept = Support.of([torch.tensor([3, 1]), torch.tensor([7]), torch.tensor([2, 4, 0])])
    assert len(kept) == 3 and kept.ids.dtype == torch.int32
    assert kept.offsets.tolist() == [0, 2, 3, 6]
    assert [kept[i].tolist() for i in range(3)] == [[3, 1], [7], [2, 4, 0]]
    assert len(Support.of([])) == 0


def test_a_support_grows_to_a_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "MOST_IDS", 5)
    growing = GrowingSupport()
    for ids in ([3, 1], [7], [2, 4]):
        growing.add(torch.tensor(ids))
    assert growing.whole().ids.tolist() == [3, 1, 7, 2, 4] and growing.whole().offsets.tolist() == [0, 2, 3, 5]
    with pytest.raises(ModelError, match=r"the first 4 tokens .* more than 5 ids in all"):
        growing.add(torch.tensor([6]))


def test_a_cut_draw_follows_the_renormalised_distribution():
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    count = 9000
    drawn = draw(probs.log().expand(count, -1), evenly_spaced(count), Cut(top_k=3))
    counts = torch.bincount(drawn.ids_B, minlength=4)
    assert (counts - count * torch.tensor([0, 4 / 9, 2 / 9, 3 / 9])).abs().max() <= 1.01


def test_an_uncut_draw_follows_the_distribution_of_the_logits():
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 3
    logps = log_probs(logits, 1.0, vocab=290)
    count = 30_000
    drawn = draw(logps.expand(count, -1), evenly_spaced(count), Cut())
    assert torch.equal(drawn.logps_B, logps[0][drawn.ids_B])
    counts = torch.bincount(drawn.ids_B, minlength=290)
    assert (counts - count * logps[0].double().exp()).abs().max() < 1.1
    assert math.isclose(logps.exp().sum().item(), 1, rel_tol=1e-5)
