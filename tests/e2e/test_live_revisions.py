"""The reward functions of a running job: tried, changed, compared, refused, taken back; from the SDK to the model."""

import base64
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from processes import Server, wait_until

from rewardsmith import GRPOConfig, RequestError, RewardFunction, Rewardsmith, SamplingParamsConfig
from rewardsmith.demo import countdown

pytestmark = pytest.mark.slow
GROUP = 8


def tag(prompt, completion, example):
    return 1.0 if "</answer>" in completion else 0.0


def half_tag(prompt, completion, example):
    print("seen", len(completion), "characters")
    return 0.5 if "</answer>" in completion else 0.0


def short(prompt, completion, example):
    return 1.0 / (1 + len(completion))


@pytest.fixture(scope="module")
def rs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Rewardsmith:
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in countdown.rows("train", 64)))
    client = server.client()
    client.datasets.from_file(rows, name="rows")
    client.repos.create(name="live")
    return client


def started(rs: Rewardsmith, steps: int = 400) -> str:
    config = GRPOConfig(
        base_model="countdown-tiny",
        reward_fns={"tag": tag},
        train_steps=steps,
        effective_batch_size=2 * GROUP,
        num_generations=GROUP,
        rank=4,
        beta=0.0,
        sampling_params=SamplingParamsConfig(max_tokens=32),
    )
    job = rs.finetuning.jobs.create(config=config, dataset="rows", repo="live")
    wait_until(lambda: rs.finetuning.jobs.get(job).step >= 2, "step 2")
    return job.adapter_id


def taken_up(rs: Rewardsmith, job: str, number: int) -> int:
    """The first step that a revision scored, when a step after it is done."""
    found = wait_until(
        lambda: (one := rs.revisions.get(job, number)).effective_step and one, f"revision {number} is taken up"
    )
    wait_until(lambda: rs.finetuning.jobs.get(job).step > found.effective_step, "a step scored by it")
    return found.effective_step


def test_a_change_is_tried_made_and_taken_back_while_the_job_runs(rs: Rewardsmith):
    job = started(rs)
    tried = rs.revisions.dry_run(job, {"tag": half_tag, "short": short}, steps=2)
    assert tried.scored == 4 * GROUP and tried.signal.groups == 4
    compared = {one.name: one for one in tried.functions}
    assert (compared["tag"].change, compared["short"].change) == ("changed", "added")
    assert compared["tag"].new.mean == pytest.approx(compared["tag"].old.mean / 2)
    assert len(rs.revisions.list(job)) == 1 and tried.failures == []

    made = rs.revisions.apply(job, {"tag": half_tag, "short": short}, note="half and short", compared_steps=4)
    assert (made.revision, made.created_by, made.note, made.effective_step) == (2, "owner", "half and short", None)
    second = taken_up(rs, job, 2)
    wait_until(lambda: rs.finetuning.jobs.get(job).step >= second + 5, "all steps of comparison")

    # Loads on the server as text, but not in the job: what its text does when it runs is known there alone.
    broken = base64.b64encode(b"def tag(prompt, completion, example, x=1 / 0):\n    return 1.0\n").decode()
    with pytest.raises(RequestError, match="tag"):
        rs.revisions.apply(job, {"tag": RewardFunction(encoded_fn=broken)})
    assert len(rs.revisions.list(job)) == 2

    back = rs.revisions.rollback(job, to=1)
    assert (back.revision, back.note) == (3, "rollback to revision 1")
    assert back.sha256 == rs.revisions.get(job, 1).sha256
    third = taken_up(rs, job, 3)
    weighed = rs.revisions.apply(job, weights={"tag": {1: 1.0, 1000: 2.0}})
    fourth = taken_up(rs, job, weighed.revision)
    rs.finetuning.jobs.stop(job)
    wait_until(lambda: rs.finetuning.jobs.get(job).status == "stopped", "the job stops")

    groups = defaultdict(set)
    for c in rs.finetuning.jobs.completions(job, phase="train"):
        expected = 1 + (c.step >= second) + (c.step >= third) + (c.step >= fourth)
        assert c.revision == expected, "every score carries the revision that gave it"
        assert set(c.scores) == ({"tag", "short"} if expected == 2 else {"tag"}) == set(c.seconds)
        groups[c.step, c.row, c.sample // GROUP].add((c.revision, frozenset(c.scores)))
        if expected == 4:
            assert c.total_reward == pytest.approx(c.scores["tag"] * (1 + (c.step - 1) / 999))
    assert len(groups) > 20 and all(len(sets) == 1 for sets in groups.values()), "no group is mixed"

    metrics = rs.finetuning.jobs.metrics(job)
    series = {name: {point.step: point.value for point in points} for name, points in metrics.items()}
    old, new = series["reward/tag@1/mean"], series["reward/tag/mean"]
    assert set(old) <= set(range(second, second + 4)) and len(old) >= 2
    assert all(value == pytest.approx(2 * new[step]) for step, value in old.items())
    assert min(series["reward/tag/weight"]) == fourth
    assert [event.kind for event in rs.finetuning.jobs.events(job) if event.kind in ("paused", "warning")][:1] != [
        "paused"
    ]

    logs: Any = rs.adapters.reward_logs
    assert {row.revision for row in logs(job, function="tag")} == {2}, "the others print nothing"
    (fold,) = logs(job, folded=True, text="seen").data
    assert fold.gist == "seen # characters" and fold.count == 2 * GROUP * (third - second)
    every = list(logs(job, every=True, from_step=second, to_step=second, phase="train"))
    assert len(every) == 2 * 2 * GROUP and all(row.seconds >= 0 and row.outcome == "ok" for row in every)
    assert Path(rs.adapters.get(job).artifact_path).name
