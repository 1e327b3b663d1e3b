import math

import pytest
import torch
from job_runs import config

from rewardsmith.rewards.outcomes import LARGEST_TOTAL, Score
from rewardsmith.rollout.engine import Completion
from rewardsmith.rollout.prompts import Prompt
from rewardsmith.train.agreement import Mismatch
from rewardsmith.train.checkpoint import Progress
from rewardsmith.train.evaluate import PATIENCE, exhausted, note_evaluation
from rewardsmith.train.metrics import step_metrics
from rewardsmith.train.samples import Sample, with_advantages
from rewardsmith.train.update import Update

UPDATE = Update(loss=0.5, kl=None, grad_norm=2.0, learning_rate=1e-3)
SAME = Mismatch(0.0, 0.0, 0.0)


def sample(
    total: float | None, *, text: str = "x", length: int = 2, reason="stop", score: Score | None = None
) -> Sample:
    completion = Completion([3] * length, [-0.5] * length, reason, text)
    scores = {"f": score or Score("ok", total, 0.1)}
    return Sample(Prompt(0, "", [1], {}), 0, completion, scores, total)


def metrics(groups: list[list[Sample]], progress: Progress | None = None, update: Update = UPDATE) -> dict[str, float]:
    groups = with_advantages(groups, config(), max_tokens=8)
    return step_metrics(groups, update, SAME, progress or Progress(), {"generate": 2.0, "update": 1.0})


def test_rewards():
    groups = [[sample(1.0), sample(0.0)], [sample(2.0), sample(None, score=Score("crash", None, 0.9))]]
    found = metrics(groups)
    assert found["total_reward"] == found["reward/f/mean"] == 1.0
    assert found["total_reward_std"] == pytest.approx(math.sqrt(2 / 3))
    assert found["reward/f/error_rate"] == 0.25
    assert found["reward/f/seconds_p95"] == 0.9


def test_abstaining_is_no_error_and_unknown_means_have_no_entry():
    found = metrics([[sample(None, score=Score("abstain", None, 0.1)) for _ in range(2)]])
    assert found["reward/f/error_rate"] == 0
    assert not {"total_reward", "total_reward_std", "reward/f/mean", "kl"} & found.keys()
    assert found["group/frac_zero_signal"] == 1
    assert all(math.isfinite(value) for value in found.values())


def test_groups_are_without_signal_by_what_the_update_learns_from():
    """With a baseline of the whole batch, groups that agree within themselves teach something."""
    groups = with_advantages(
        [[sample(0.0), sample(0.0)], [sample(1.0), sample(1.0)]], config(advantage="reinforce_pp"), max_tokens=8
    )
    found = step_metrics(groups, UPDATE, SAME, Progress(), {"generate": 1.0})
    assert found["group/frac_zero_signal"] == 0
    assert (found["group/frac_all_best"], found["group/frac_all_worst"]) == (0.5, 0.5)


def test_groups_against_the_best_and_worst_seen_so_far():
    progress = Progress()
    first = [[sample(0.0), sample(0.0)], [sample(1.0), sample(1.0)], [sample(1.0), sample(0.5)], [sample(0.5)] * 2]
    found = metrics(first, progress)
    assert found["group/frac_zero_signal"] == 0.75
    assert (found["group/frac_all_best"], found["group/frac_all_worst"]) == (0.25, 0.25)
    later = metrics([[sample(1.0), sample(1.0)]], progress)
    assert (later["group/frac_all_best"], later["group/frac_all_worst"]) == (1, 0)
    alone = metrics([[sample(1.0), sample(1.0)]])
    assert (alone["group/frac_all_best"], alone["group/frac_all_worst"]) == (0, 0)


def test_completions():
    groups = [
        [sample(1, text="a", length=2), sample(1, text="a", length=4)],
        [sample(0, text="a", length=6, reason="length"), sample(0, text="b", length=8)],
    ]
    found = metrics(groups)
    assert {name: found[f"completions/{name}"] for name in ("mean_length", "min_length", "max_length")} == {
        "mean_length": 5.0,
        "min_length": 2.0,
        "max_length": 8.0,
    }
    assert found["completions/clipped_ratio"] == 0.25
    assert found["completions/duplicate_ratio"] == 0.25  # twice the same in one group; across groups does not count
    assert found["entropy"] == 0.5
    assert (found["tokens"], found["tokens_per_second"]) == (20, pytest.approx(20 / 3))


def test_the_update():
    found = metrics([[sample(1), sample(0)]], update=Update(0.5, 0.25, 2.0, 1e-3))
    assert (found["loss"], found["kl"], found["grad_norm"], found["learning_rate"]) == (0.5, 0.25, 2.0, 1e-3)
    assert (found["seconds/generate"], found["seconds/update"]) == (2.0, 1.0)


def test_the_ratio_of_an_on_policy_update_is_never_clipped():
    found = step_metrics([[sample(1), sample(0)]], UPDATE, Mismatch(0.5, 1.0, 3.0), Progress(), {})
    assert (found["clip_ratio/low"], found["clip_ratio/high"]) == (0.0, 0.0)
    assert (found["mismatch/kl"], found["mismatch/logp_max_diff"]) == (0.5, 3.0)


def test_the_largest_rewards_give_finite_numbers():
    found = metrics([[sample(LARGEST_TOTAL), sample(-LARGEST_TOTAL)], [sample(LARGEST_TOTAL), sample(0.0)]])
    assert all(math.isfinite(value) for value in found.values())


def test_mismatch_by_hand():
    trainer, sampler = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([-1.0, -1.5, -1.5])
    found = Mismatch.of(trainer, sampler)
    assert found.max_difference == 0.5
    assert found.mean_difference == pytest.approx(1 / 3)
    assert found.kl == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-0.5) - 0.5) / 3)


def evaluated(progress: Progress, *rewards: float) -> Progress:
    for number, reward in enumerate(rewards, start=(progress.last_checkpoint or 0) + 1):
        note_evaluation(progress, [sample(reward)])
        progress = progress.with_checkpoint(number, reward)
    return progress


def test_the_best_checkpoint_is_the_one_with_the_highest_held_out_reward():
    progress = Progress()
    note_evaluation(progress, [sample(0.9)])  # the base, which is no checkpoint
    progress = evaluated(progress, 0.5, 0.505, 0.3)
    assert (progress.best_checkpoint, progress.best_reward, progress.served) == (2, 0.505, 2)


def test_totals_of_two_revisions_are_never_compared():
    progress = Progress()
    progress.use_revision(1)
    progress = evaluated(progress, 10.5, 10.3, 10.2)
    progress.lowest, progress.highest = 9.0, 11.0
    progress.use_revision(1)  # nothing new
    assert (progress.best_checkpoint, progress.stale, progress.highest) == (1, 2, 11.0)
    progress.use_revision(2)
    assert progress == Progress(last_checkpoint=3, saved_step=0, revision=2)
    assert progress.served == 3
    progress = evaluated(progress, 0.5, 0.3)
    assert (progress.best_checkpoint, progress.best_reward, progress.plateau, progress.stale) == (4, 0.5, 0.5, 1)


def test_a_checkpoint_counts_only_in_the_progress_that_has_it():
    before = evaluated(Progress(), 0.5)
    after = before.with_checkpoint(2, 0.7)
    assert (before.served, after.served) == (1, 2)
    assert before.with_checkpoint(2, None).served == 1  # saved without an evaluation


def test_without_held_out_rows_the_last_checkpoint_is_served():
    assert Progress(last_checkpoint=4).served == 4
    assert Progress().served is None


def test_a_plateau_is_five_evaluations_that_do_not_rise_by_a_hundredth():
    progress = evaluated(Progress(), 0.5, *[0.509] * (PATIENCE - 1))
    assert not exhausted(progress)
    assert exhausted(evaluated(progress, 0.509))
    # Small steps that add up to more than a hundredth are a rise.
    assert not exhausted(evaluated(Progress(), *[0.5 + 0.004 * i for i in range(20)]))


def test_an_evaluation_without_any_total_counts_for_nothing():
    progress = Progress()
    assert "eval/total_reward" not in note_evaluation(progress, [sample(None)])
    assert progress == Progress()
