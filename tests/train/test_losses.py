"""Every loss, KL and correction against numbers worked out here from the formula."""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

import rewardsmith
from rewardsmith.config import CLIP_BOUNDS, GRPOConfig, KLEstimator, Loss
from rewardsmith.train import grpo
from rewardsmith.train.losses import (
    KL,
    LossSettings,
    TokenBatch,
    dead_settings,
    k1,
    k2,
    k3,
    needs_whole_completions,
    sapo,
    token_losses,
)

DOUBLE = torch.float64


def batch(
    ratios: list[list[float]],
    advantages: list[float],
    *,
    on_policy: bool = False,
    sampler: list[list[float]] | None = None,
    reference: list[list[float]] | None = None,
) -> tuple[torch.Tensor, TokenBatch]:
    """Log-probs of the policy and the tokens, from ratios policy / old, old / sampler and policy / reference."""
    lengths = torch.tensor([len(row) for row in ratios])
    logps = -torch.arange(1.0, int(lengths.sum()) + 1, dtype=DOUBLE) / 4

    def log(rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor([value for row in rows for value in row], dtype=DOUBLE).log()

    old = logps if on_policy else logps - log(ratios)
    tokens = TokenBatch(
        completion_N=torch.arange(len(ratios)).repeat_interleave(lengths),
        advantages_N=torch.tensor(advantages, dtype=DOUBLE).repeat_interleave(lengths),
        weights_N=torch.ones(len(logps), dtype=DOUBLE),
        sampler_logps_N=old if sampler is None else old - log(sampler),
        old_logps_N=None if on_policy else old,
        reference_logps_N=None if reference is None else logps - log(reference),
    )
    return logps.clone().requires_grad_(), tokens


def run(made: tuple[torch.Tensor, TokenBatch], **settings) -> tuple[list[float], list[float]]:
    """Losses and, token by token, their derivative by the log-prob."""
    logps, tokens = made
    found = token_losses(logps, tokens, LossSettings(**settings)).losses_N
    found.sum().backward()
    return found.tolist(), logps.grad.tolist()


CLIPPED = {"clip_low": 0.2, "clip_high": 0.3}


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_the_surrogate_is_the_smaller_of_the_ratio_and_the_clipped_ratio(loss: str):
    value, slope = run(batch([[1.0, 1.5, 0.5]] * 2, [2.0, -2.0]), loss=loss, **CLIPPED)
    # A = 2: ratios 1, 1.3 (clipped), 0.5. A = -2: ratios 1, 1.5, 0.8 (clipped). The derivative is -ratio * A or 0.
    assert value == pytest.approx([-2, -2.6, -1, 2, 3, 1.6])
    assert slope == pytest.approx([-2, 0, -1, 2, 3, 0])


def test_dual_clip_bounds_the_loss_of_unlikely_bad_tokens():
    made = batch([[2.0, 4.0, 0.5], [4.0]], [-2.0, 2.0])
    value, slope = run(made, loss="grpo", dual_clip=3.0, **CLIPPED)
    # A = -2: -max(-4, -6), -max(-8, -6), -max(-1.6, -6). A = 2 is left alone: 1.3 * 2.
    assert value == pytest.approx([4, 6, 1.6, -2.6])
    assert slope == pytest.approx([4, 0, 0, 0])
    found = token_losses(made[0], made[1], LossSettings(loss="grpo", dual_clip=3.0, **CLIPPED))
    assert found.clipped_high_N.tolist() == [False, True, False, True]
    assert found.clipped_low_N.tolist() == [False, False, True, False]


def test_gspo_has_the_ratio_of_the_sequence_and_its_gradient():
    made = batch([[1.5, 0.8], [0.9, 0.5, 1.0], [1.0001]], [2.0, -1.0, 3.0])
    value, slope = run(made, loss="gspo", clip_low=3e-4, clip_high=4e-4)
    first, second = (1.5 * 0.8) ** (1 / 2), (0.9 * 0.5) ** (1 / 3)
    # 1.095 is over 1.0004 and 0.766 is under 0.9997, where A < 0 is clipped; 1.0001 is within.
    assert first > 1.0004 and second < 0.9997
    assert value == pytest.approx([-2 * 1.0004] * 2 + [0.9997] * 3 + [-3 * 1.0001])
    assert slope == pytest.approx([0, 0, 0, 0, 0, -3 * 1.0001])
    value, slope = run(batch([[1.5, 0.8], [0.9, 0.5, 1.0]], [2.0, -1.0]), loss="gspo", clip_low=0.9, clip_high=9.0)
    assert value == pytest.approx([-2 * first] * 2 + [second] * 3)
    assert slope == pytest.approx([-2 * first] * 2 + [second] * 3)


def test_gspo_tokens_have_the_gradient_of_the_papers_sequence_objective():
    logps, tokens = batch([[1.5, 0.8], [0.9, 0.5, 1.0]], [2.0, -1.0])
    lengths = torch.tensor([2.0, 3.0], dtype=DOUBLE)
    weights = (1 / (2 * lengths)).repeat_interleave(lengths.long())
    found = token_losses(logps, tokens, LossSettings(loss="gspo", clip_low=0.9, clip_high=9.0))
    (by_token,) = torch.autograd.grad((weights * found.losses_N).sum(), logps)
    ratio = (logps - tokens.old_logps_N).split([2, 3])
    objective = sum(part.mean().exp() * a for part, a in zip(ratio, (2.0, -1.0), strict=True)) / 2
    (by_sequence,) = torch.autograd.grad(-objective, logps)
    assert torch.allclose(by_token, by_sequence, atol=1e-14)


def test_cispo_weighs_the_log_prob_and_keeps_the_gradient_of_clipped_tokens():
    made = batch([[1.0, 7.0, 0.1], [7.0]], [2.0, -1.0])
    value, slope = run(made, loss="cispo", clip_low=math.inf, clip_high=4.0)
    weights = [1.0 * 2, 5.0 * 2, 0.1 * 2, -5.0]
    assert slope == pytest.approx([-weight for weight in weights])
    assert value == pytest.approx([weight / 4 * n for n, weight in enumerate(weights, start=1)])  # log-probs -n / 4
    _, slope = run(batch([[0.1]], [2.0]), loss="cispo", clip_low=0.2, clip_high=4.0)
    assert slope == pytest.approx([-1.6])


def test_sapo_has_a_gate_whose_slope_fades_on_both_sides():
    value, slope = run(batch([[1.0, 2.0], [0.5, 1.0]], [2.0, -1.0]), loss="sapo")

    def gate(tau: float, ratio: float) -> float:
        return 4 / tau / (1 + math.exp(-tau * (ratio - 1)))

    def gate_slope(tau: float, ratio: float) -> float:
        share = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return 4 * share * (1 - share) * ratio

    assert value == pytest.approx([-2 * gate(1, 1), -2 * gate(1, 2), gate(1.05, 0.5), gate(1.05, 1)])
    assert slope == pytest.approx([-2, -2 * gate_slope(1, 2), gate_slope(1.05, 0.5), 1])
    assert gate_slope(1, 2) < 2 * 0.8  # less than the ratio alone
    found = token_losses(*batch([[9.0, 0.01]], [1.0]), LossSettings(loss="sapo", clip_low=0.2, clip_high=0.2))
    assert not found.clipped_low_N.any() and not found.clipped_high_N.any()
    # Advantage 0 takes the temperature of the negative ones; its loss is 0 with either.
    assert sapo(torch.ones(1), torch.zeros(1)).item() == 0


@pytest.mark.parametrize("loss", get_args(Loss))
def test_in_the_first_update_every_loss_has_minus_the_advantage_as_its_gradient(loss: str):
    made = batch([[1.0, 1.0, 1.0], [1.0]], [3.0, -4.0], on_policy=True)
    clip_low, clip_high = CLIP_BOUNDS[loss]
    _, slope = run(made, loss=loss, clip_low=clip_low, clip_high=clip_high)
    assert slope == pytest.approx([-3, -3, -3, 4])


def test_which_tokens_are_clipped():
    made = batch([[1.5, 0.5, 1.0], [1.5, 0.5, 1.0], [1.5, 0.5, 1.0]], [1.0, -1.0, 0.0])
    found = token_losses(*made, LossSettings(loss="dapo", **CLIPPED))
    assert found.clipped_high_N.tolist() == [True] + [False] * 8
    assert found.clipped_low_N.tolist() == [False] * 4 + [True] + [False] * 4
    found = token_losses(*made, LossSettings(loss="cispo", **CLIPPED))
    assert found.clipped_high_N.tolist() == [True, False, False, True] + [False] * 5
    assert found.clipped_low_N.tolist() == [False, True, False, False, True] + [False] * 4


# ---- KL -------------------------------------------------------------------------------------------------------------


def test_kl_estimators_by_hand():
    own, reference = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0 + math.log(2)])
    assert k1(own, reference).tolist() == pytest.approx([0, -math.log(2)])
    assert k2(own, reference).tolist() == pytest.approx([0, math.log(2) ** 2 / 2])
    assert k3(own, reference).tolist() == pytest.approx([0, 2 - 1 - math.log(2)], abs=1e-6)


def test_k1_and_k3_estimate_the_divergence_and_k2_has_its_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=generator, dtype=DOUBLE, requires_grad=True)
    q = torch.randn(12, generator=generator, dtype=DOUBLE).log_softmax(-1)
    p = logits.log_softmax(-1)
    weight = p.detach().exp()  # the exact expectation over what is drawn from the policy
    divergence = (p.exp() * (p - q)).sum()
    (exact,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    assert k3(p, q).min() >= 0
    for estimate in (k1, k3):
        assert torch.allclose((weight * estimate(p, q)).sum(), divergence)
    of_k2, of_k1 = (torch.autograd.grad((weight * k(p, q)).sum(), logits, retain_graph=True)[0] for k in (k2, k1))
    assert torch.allclose(of_k2, exact)
    assert of_k1.abs().max() < 1e-12
    # In the reward an estimate is a constant that the log-prob is weighed with.
    constants = [k(p, q).detach() for k in (k1, k2, k3)]
    in_reward = [torch.autograd.grad((weight * c * p).sum(), logits, retain_graph=True)[0] for c in constants]
    assert [torch.allclose(gradient, exact) for gradient in in_reward] == [True, False, False]


def test_k3_is_bounded_where_it_would_overflow_and_exact_elsewhere():
    own, reference = torch.tensor([-200.0, -30.0, -1.0], requires_grad=True), torch.tensor([-1.0, -5.0, -200.0])
    found = k3(own, reference)
    assert found.tolist() == pytest.approx([math.exp(20) - 21, math.exp(20) - 21, 198])
    found.sum().backward()
    assert own.grad.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", math.log(2), 1.0),
        ("k2", math.log(2) ** 2 / 2, math.log(2)),
        ("k3", 0.5 - 1 + math.log(2), 1 - 0.5),
    ],
)
def test_kl_is_added_to_the_loss(estimator: str, value: float, slope: float):
    made = batch([[1.0], [1.0]], [3.0, 0.0], reference=[[2.0], [2.0]], on_policy=True)
    found, gradient = run(made, loss="dapo", beta=0.1, kl_estimator=estimator)
    assert found == pytest.approx([-3 + 0.1 * value, 0.1 * value])
    assert gradient == pytest.approx([-3 + 0.1 * slope, 0.1 * slope])
    shown = token_losses(*made, LossSettings(beta=0.1, kl_estimator=estimator)).kl_N
    assert shown.tolist() == pytest.approx([0.5 - 1 + math.log(2)] * 2) and not shown.requires_grad


# ---- sampler correction ---------------------------------------------------------------------------------------------

SAMPLER = [[0.4, 1.0, 3.0], [1.5, 2.0]]  # old / sampler; products 1.2 and 3


@pytest.mark.parametrize(
    ("mode", "level", "low", "expected"),
    [
        ("truncate", "token", 0.0, [0.4, 1, 2, 1.5, 2]),
        ("truncate", "token", 0.5, [0.5, 1, 2, 1.5, 2]),
        ("mask", "token", 0.5, [0, 1, 0, 1.5, 2]),
        ("truncate", "sequence", 0.0, [1.2, 1.2, 1.2, 2, 2]),
        ("mask", "sequence", 0.5, [1.2, 1.2, 1.2, 0, 0]),
        ("none", "token", 0.0, [1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("on_policy", [True, False])
def test_sampler_corrections_weigh_the_policy_loss(
    mode: str, level: str, low: float, expected: list[float], on_policy: bool
):
    made = batch([[1.0] * 3, [1.0] * 2], [2.0, -1.0], sampler=SAMPLER, on_policy=on_policy)
    settings = {"correction": mode, "correction_level": level, "correction_low": low, "correction_high": 2.0 + 1e-9}
    value, slope = run(made, loss="dapo", **settings)
    assert value == pytest.approx([-w * a for w, a in zip(expected, [2, 2, 2, -1, -1], strict=True)], rel=1e-6)
    assert slope == pytest.approx(value, rel=1e-6)  # a constant weight


def test_the_correction_is_for_the_old_policy_and_leaves_the_kl_alone():
    made = batch([[1.1]], [1.0], sampler=[[1.5]], reference=[[2.0]])
    value, _ = run(made, loss="dapo", correction="truncate", beta=0.1)
    assert value == pytest.approx([-1.1 * 1.5 + 0.1 * (0.5 - 1 + math.log(2))])


@pytest.mark.parametrize("estimator", get_args(KLEstimator))
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", get_args(Loss))
def test_ratios_beyond_all_bounds_stay_finite(loss: str, level: str, estimator: str):
    logps = torch.tensor([-0.1, -500.0, -0.1, -500.0], requires_grad=True)
    far = torch.tensor([-500.0, -0.1, -500.0, -0.1])
    tokens = TokenBatch(
        torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.ones(4), far.clone(), far, far.clone()
    )
    correction = {"correction": "truncate", "correction_level": level}
    kl = {"beta": 0.1, "kl_estimator": estimator}
    settings = LossSettings(loss=loss, clip_low=math.inf, clip_high=math.inf, **correction, **kl)
    found = token_losses(logps, tokens, settings)
    found.losses_N.sum().backward()
    assert found.losses_N.isfinite().all() and found.kl_N.isfinite().all() and logps.grad.isfinite().all()


# ---- slices ---------------------------------------------------------------------------------------------------------


def everything(first: bool) -> tuple[torch.Tensor, TokenBatch]:
    return batch(
        [[1.5, 0.8, 1.0], [0.9], [1.2, 1.1, 0.7, 1.0], [0.6, 2.0]],
        [1.0, -2.0, -1.0, 0.5],
        on_policy=first,
        sampler=[[0.4, 1.0, 3.0], [1.5], [0.9, 1.0, 1.1, 1.0], [2.0, 2.0]],
        reference=[[1.0, 2.0, 0.5], [1.0], [0.5, 1.5, 1.0, 1.0], [1.1, 0.9]],
    )


WIDE = CLIP_BOUNDS | {"gspo": (0.9, 9.0)}  # its own bounds clip all of these, which would hide a wrong ratio
SETTINGS = [
    LossSettings(loss, *WIDE[loss], beta=0.1, correction=mode, correction_level=level, correction_low=0.5)
    for loss, mode, level in itertools.product(get_args(Loss), ("none", "mask"), ("token", "sequence"))
]


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.loss}-{s.correction}-{s.correction_level}")
def test_slices_give_what_the_whole_gives(settings: LossSettings, first: bool):
    logps, tokens = everything(first)
    whole = token_losses(logps, tokens, settings)
    (gradient,) = torch.autograd.grad(whole.losses_N.sum(), logps)
    expects_whole = needs_whole_completions(settings, first)
    assert expects_whole == (
        (settings.correction != "none" and settings.correction_level == "sequence")
        or (settings.loss == "gspo" and not first)
    )
    bounds = [0, 3, 4, 8, 10] if expects_whole else range(11)
    parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    pieces = [token_losses(logps[part], tokens[part], settings) for part in parts]
    assert torch.allclose(torch.cat([piece.losses_N for piece in pieces]), whole.losses_N, rtol=0, atol=1e-15)
    assert torch.equal(torch.cat([piece.clipped_low_N for piece in pieces]), whole.clipped_low_N)
    assert torch.equal(torch.cat([piece.kl_N for piece in pieces]), whole.kl_N)
    (by_pieces,) = torch.autograd.grad(sum(piece.losses_N.sum() for piece in pieces), logps)
    assert torch.allclose(by_pieces, gradient, rtol=0, atol=1e-15)
    if expects_whole:
        cut = token_losses(logps[:2], tokens[:2], settings)
        assert not torch.allclose(cut.losses_N, whole.losses_N[:2])


def test_completions_may_be_numbered_with_gaps():
    logps, tokens = everything(first=False)
    gaps = TokenBatch(tokens.completion_N * 7 + 3, *tokens._tensors()[1:])
    settings = LossSettings(loss="gspo", clip_low=9.0, clip_high=9.0)
    assert torch.equal(token_losses(logps, gaps, settings).losses_N, token_losses(logps, tokens, settings).losses_N)


# ---- settings -------------------------------------------------------------------------------------------------------


def test_settings_take_the_published_values_of_the_loss():
    def bounds(**fields) -> tuple[float, float]:
        settings = LossSettings.of(GRPOConfig(**fields))
        return settings.clip_low, settings.clip_high

    assert bounds(loss="grpo") == bounds(loss="dr_grpo") == bounds(loss="bnpo") == (0.2, 0.2)
    assert bounds() == bounds(loss="dapo") == (0.2, 0.28)
    assert bounds(loss="gspo") == (3e-4, 4e-4)
    assert bounds(loss="cispo") == (math.inf, 4.0)
    assert bounds(loss="grpo", clip_high=0.3) == (0.2, 0.3)
    assert bounds(loss="cispo", clip_low=0.1) == (0.1, 4.0)


def test_settings_of_kl_and_correction():
    plain = LossSettings.of(GRPOConfig(beta=0.2))
    assert (plain.beta, plain.kl_estimator, plain.correction) == (0.2, "k3", "none")
    assert LossSettings.of(GRPOConfig(beta=0.2, kl_in="reward", advantage="rloo")).beta == 0
    in_reward = {"kl_in": "reward", "advantage": "rloo"}
    assert [GRPOConfig(kl_estimator=k, **in_reward).kl_estimate for k in (None, *KL)] == ["k1", "k1", "k2", "k3"]

    def correction(loss: str = "dapo", **fields) -> tuple:
        found = LossSettings.of(GRPOConfig(loss=loss, sampler_correction=fields))
        return found.correction, found.correction_level, found.correction_low, found.correction_high

    assert correction(mode="truncate") == ("truncate", "token", 0.0, 2.0)
    assert correction(mode="mask") == ("mask", "token", 0.5, 2.0)
    assert correction(mode="mask", low=0.9, high=1.1, level="sequence") == ("mask", "sequence", 0.9, 1.1)
    assert correction("gspo", mode="mask")[1] == "sequence"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, []),
        ({"clip_high": 0.28}, ["clip_low and clip_high cannot act"]),
        ({"clip_high": 0.28, "updates_per_batch": 2}, []),
        ({"loss": "gspo"}, ["loss gspo has the same gradient as grpo"]),
        ({"loss": "sapo"}, ["loss sapo has the same gradient as grpo"]),
        ({"loss": "cispo"}, ["loss cispo has the same gradient as dapo"]),
        ({"loss": "cispo", "updates_per_batch": 4}, []),
        ({"kl_estimator": "k2"}, []),
        ({"kl_estimator": "k2", "beta": 0}, ["kl_estimator=k2 cannot act: beta is 0"]),
        ({"kl_estimator": "k1"}, ["kl_estimator=k1 in the loss has no gradient on average"]),
        ({"kl_estimator": "k1", "kl_in": "reward", "advantage": "rloo"}, []),
        (
            {"kl_estimator": "k3", "kl_in": "reward", "advantage": "rloo"},
            ["k3 in the reward has another gradient"],
        ),
        ({"sampler_correction": {"mode": "none", "high": 3}}, ["sampler_correction cannot act"]),
        ({"sampler_correction": {"high": 3}}, []),
    ],
)
def test_what_cannot_act_is_said(fields: dict, said: list[str]):
    found = list(dead_settings(GRPOConfig(**fields)))
    assert len(found) == len(said) and all(part in message for part, message in zip(said, found, strict=True))


def test_every_name_in_the_config_has_its_formula():
    assert set(get_args(Loss)) == set(CLIP_BOUNDS)
    assert set(get_args(KLEstimator)) == set(KL)


def test_an_unknown_name_is_not_taken_for_another():
    with pytest.raises(AssertionError, match=r"unreachable.*'ppo'"):
        run(batch([[1.0]], [1.0]), loss="ppo")
    with pytest.raises(AssertionError, match=r"unreachable.*'ppo'"):
        grpo.weights(torch.tensor([3]), torch.tensor([True]), "ppo", 8)
    with pytest.raises(AssertionError, match=r"unreachable.*'mean'"):
        grpo.advantages(torch.tensor([[0.0, 1.0]]), "mean")


def test_losses_load_without_pydantic():
    """As on a machine that has torch and little else; the package's root is for users and is left out."""
    code = (
        "import sys, types; root = types.ModuleType('rewardsmith'); root.__path__ = [sys.argv[1]]; "
        "sys.modules |= {'rewardsmith': root, 'pydantic': None}; import rewardsmith.train.batch"
    )
    arguments = [sys.executable, "-c", code, str(Path(rewardsmith.__file__).parent)]
    loaded = subprocess.run(arguments, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
