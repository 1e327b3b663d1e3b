"""What becomes of totals and lengths on their way to advantages and weights."""

import math

import pytest
import torch
from job_runs import config
from obvious_gradient import (
    CUT_OFF,
    LENGTHS,
    MAX_TOKENS,
    TOTALS,
    VOCAB,
    groups,
    policy,
    straightforward_logps,
    whole_batch,
)

from rewardsmith.train.plain import PlainPath
from rewardsmith.train.samples import examples, shaped_totals, with_advantages
from rewardsmith.train.update import make_optimizer


def test_filtered_completions_are_as_if_they_had_not_been_drawn_for_the_loss():
    job = config(loss="grpo", overlong="filter", advantage="group_mean")
    weights = [example.weight for example in whole_batch(job)]
    totals = [total for group in TOTALS for total in group]
    counted = [total is not None and divmod(i, 3) not in CUT_OFF for i, total in enumerate(totals)]
    lengths = [length for group in LENGTHS for length in group]
    expected = [c / (sum(counted) * length) for c, length in zip(counted, lengths, strict=True)]
    assert weights == pytest.approx(expected)
    # Their totals still count in the group's mean: a cut off answer is an answer that was worth this much.
    assert whole_batch(job)[0].advantage == pytest.approx(0 - 1.25 / 3)


def test_long_completions_are_punished_before_advantages_and_totals_stay():
    job = config(overlong="punish", overlong_buffer=4, sampling_params={"max_tokens": MAX_TOKENS})
    drawn = groups()
    # Lengths 1, 4, 9 (cut off); 12 (cut off), 1, 1; 3, 2 (cut off), 5; 2, 2, 7: up to 8 tokens are free.
    nan = math.nan
    expected = [[0, 1, -0.75], [1, nan, -1], [0.5, -0.5, 0.5], [nan, 1, nan]]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert torch.allclose(shaped_totals(drawn, job, MAX_TOKENS), expected, equal_nan=True)
    with_all = with_advantages(drawn, job, MAX_TOKENS)
    assert [sample.total for group in with_all for sample in group] == [t for row in TOTALS for t in row]
    assert with_all[2][1].advantage < 0 < with_all[2][0].advantage  # equal totals, one of them cut off
    default = config(overlong="punish", sampling_params={"max_tokens": MAX_TOKENS})  # the last 2 of 12
    assert shaped_totals(drawn, default, MAX_TOKENS)[0].tolist() == [0, 1, -0.75]


@pytest.mark.parametrize("estimator", [None, "k1", "k2", "k3"])
def test_the_kl_in_the_reward_is_the_samplers_to_the_reference(estimator: str | None):
    job, model = config(beta=0.1, kl_in="reward", kl_estimator=estimator, advantage="group_mean"), policy()
    drawn = groups()
    path = PlainPath(model, VOCAB)
    references = path.reference_logps(examples(drawn, job, MAX_TOKENS), job)
    with torch.no_grad(), model.disable_adapter():
        expected = straightforward_logps(model, job)
    assert all(torch.allclose(one, other) for one, other in zip(references, expected, strict=True))
    shaped = shaped_totals(drawn, job, MAX_TOKENS, references)
    samples = [sample for group in drawn for sample in group]
    for i, (sample, reference) in enumerate(zip(samples, expected, strict=True)):
        if sample.total is not None:
            log_x = [float(to) - own for own, to in zip(sample.completion.logps, reference, strict=True)]
            by_token = {
                "k1": [-x for x in log_x],
                "k2": [x**2 / 2 for x in log_x],
                "k3": [math.exp(x) - 1 - x for x in log_x],
            }
            kl = sum(by_token[estimator or "k1"])
            assert float(shaped.flatten()[i]) == pytest.approx(sample.total - 0.1 * kl)
    assert shaped.isnan().sum() == 3
    # Nothing of it is left in the loss: no reference pass, and what has no advantage is passed over.
    batch = examples(with_advantages(drawn, job, MAX_TOKENS, references), job, MAX_TOKENS)
    make_optimizer(model, job.optimizer, 1e-3)
    found = path.gradient(batch, job)
    assert found.kl is None and sum(logps is not None for logps in found.logps) == 8
    with pytest.raises(AssertionError):
        with_advantages(drawn, job, MAX_TOKENS)
