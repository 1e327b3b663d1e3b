import pytest
from stored import (
    LEASE,
    claim,
    completion,
    create_job,
    finish,
    function,
    params,
    report_checkpoint,
    report_step,
    step_report,
    write_segment,
)

from rewardsmith import wire
from rewardsmith.errors import ConfigError, Conflict, NotFound
from rewardsmith.store import Claim, Store


def event(store: Store, claimed: Claim, kind: str, message: str = "said", **fields: object) -> wire.Control:
    report = wire.EventReport(fence=claimed.fence, kind=kind, message=message, **fields)  # type: ignore[arg-type]
    return store.runs.report_event(claimed.uuid, report, LEASE)


def told(store: Store, claimed: Claim, kind: str) -> list[str]:
    return [line.message for line in store.runs.events(claimed.uuid) if line.kind == kind]


def points(store: Store, uuid: str, series: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in store.telemetry.metrics(uuid).get(series, [])]


def test_the_spec_has_all_a_first_attempt_needs(store: Store) -> None:
    job = create_job(store)
    claimed = claim(store)
    spec = store.runs.spec(job.uuid, claimed.fence)
    assert (spec.fence, spec.attempt, spec.params, spec.base_model_source) == (1, 1, params(), "owner/tiny")
    assert (spec.repo, spec.version, spec.continue_from_path, spec.resume) == ("math", 1, None, None)
    assert (spec.revision.revision, spec.revision.functions) == (1, [function()])
    assert spec.artifacts_url == store.artifacts.url
    assert store.artifacts.get(spec.dataset_path) == b'{"prompt":"1+1="}\n'


def test_a_step_is_committed_with_metrics_and_job_numbers(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    report_step(store, claimed, 0, metrics={"eval/total_reward": 0.2})
    report_step(store, claimed, 1)
    report_step(store, claimed, 2)
    job = store.runs.get(claimed.uuid)
    assert (job.step, job.total_steps, job.steps_per_epoch, job.total_reward) == (2, 100, 10, 0.02)
    assert points(store, claimed.uuid, "total_reward") == [(1, 0.01), (2, 0.02)]
    assert store.telemetry.metrics(claimed.uuid, ["loss", "unknown"], after_step=1).keys() == {"loss"}
    steps = store.telemetry.steps(claimed.uuid)
    assert [(record.step, record.epoch, record.revision) for record in steps] == [(0, 0, 1), (1, 0.1, 1), (2, 0.2, 1)]
    assert steps[0].metrics == {"eval/total_reward": 0.2}
    assert [record.step for record in store.telemetry.steps(claimed.uuid, after_step=0, limit=1)] == [1]
    with pytest.raises(NotFound):
        store.telemetry.steps("nobody")


def test_a_report_sent_again_changes_nothing(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    segment = write_segment(store, claimed.uuid, [completion(1, 0)])
    first = report_step(store, claimed, 1, segments=[segment])
    before = store.runs.get(claimed.uuid), store.telemetry.steps(claimed.uuid), store.telemetry.segments(claimed.uuid)
    assert report_step(store, claimed, 1, segments=[segment], metrics={"total_reward": 99.0}) == first
    assert before == (
        store.runs.get(claimed.uuid),
        store.telemetry.steps(claimed.uuid),
        store.telemetry.segments(claimed.uuid),
    )


def test_a_late_report_does_not_take_the_job_back(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    report_step(store, claimed, 2)
    report_step(store, claimed, 1)
    assert (store.runs.get(claimed.uuid).step, store.runs.get(claimed.uuid).total_reward) == (2, 0.02)
    assert [record.step for record in store.telemetry.steps(claimed.uuid)] == [1, 2]


def test_metrics_that_are_no_numbers_are_refused_whole(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="metric 'loss' of step 1 is"):
            report_step(store, claimed, 1, metrics={"total_reward": 1.0, "loss": value})
    assert store.telemetry.steps(claimed.uuid) == []
    report_step(store, claimed, 1)


@pytest.mark.parametrize(
    "path", ["jobs/other/segments/x.parquet", "../{uuid}/x", "/{uuid}/x", "datasets/{uuid}", "{uuid}"]
)
def test_a_job_names_files_of_its_own_folders_only(store: Store, path: str) -> None:
    create_job(store)
    claimed = claim(store)
    segment = write_segment(store, claimed.uuid, [completion(1, 0)])
    wrong = path.format(uuid=claimed.uuid)
    with pytest.raises(ConfigError):
        report_step(store, claimed, 1, segments=[segment.model_copy(update={"path": wrong})])
    with pytest.raises(ConfigError):
        report_checkpoint(store, claimed, 1, 1, path=wrong)
    with pytest.raises(ConfigError):
        report_checkpoint(store, claimed, 1, 1, state_path=wrong)
    assert store.telemetry.segments(claimed.uuid) == []
    assert store.registry.get_version("math", 1).checkpoints == []


def test_a_segment_of_another_step_is_refused(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    segment = write_segment(store, claimed.uuid, [completion(2, 0)])
    with pytest.raises(ConfigError, match="is of step 2, its report of step 1"):
        report_step(store, claimed, 1, segments=[segment])


def _run(store: Store, claimed: Claim, first: int, last: int, save_every: int = 2) -> None:
    for step in range(first, last + 1):
        segments = [write_segment(store, claimed.uuid, [completion(step, 0)], name=f"-{claimed.fence}")]
        report_step(store, claimed, step, segments=segments)
        if step and step % save_every == 0:
            report_checkpoint(store, claimed, step // save_every, step, best=step == 4)


def test_a_new_attempt_resumes_and_what_lay_beyond_is_truncated(store: Store) -> None:
    job = create_job(store)
    first = claim(store)
    held_out = write_segment(store, job.uuid, [completion(0, 0, phase="eval")])
    report_step(store, first, 0, metrics={"eval/total_reward": 0.5}, segments=[held_out])
    _run(store, first, 1, 7)
    store.runs.add_revision(job.uuid, params("two"), [function("two")], "owner")
    event(store, first, "revision", revision=2, step=7)
    store.runs.release(job.uuid, first.fence)
    second = claim(store)
    spec = store.runs.spec(job.uuid, second.fence)
    assert spec.resume == wire.ResumePoint(step=6, checkpoint=3, state_path=f"jobs/{job.uuid}/states/3-step-6")
    assert points(store, job.uuid, "loss")[-1][0] == 6
    assert [record.step for record in store.telemetry.steps(job.uuid)] == [0, 1, 2, 3, 4, 5, 6]
    assert [segment.step for segment in store.telemetry.segments(job.uuid)] == [0, 1, 2, 3, 4, 5, 6]
    resumed = store.runs.get(job.uuid)
    assert (resumed.step, resumed.total_reward, resumed.attempt) == (6, 0.06, 2)
    # Revision 2 was effective from step 7, which comes again: the attempt begins with 1 and is told of 2.
    assert spec.revision.revision == 1 and store.runs.revision(job.uuid, 2).effective_step is None
    _run(store, second, 7, 8)
    assert [segment.step for segment in store.telemetry.segments(job.uuid)] == list(range(9))
    assert report_step(store, second, 9).revision == 2


def test_an_attempt_without_a_checkpoint_starts_over_and_keeps_step_0(store: Store) -> None:
    job = create_job(store)
    first = claim(store)
    before = write_segment(store, job.uuid, [completion(0, 0, phase="eval", completion="old")], name="-1")
    report_step(store, first, 0, metrics={"eval/total_reward": 0.5, "eval/exact": 0.5}, segments=[before])
    report_step(store, first, 1)
    store.runs.release(job.uuid, first.fence)
    second = claim(store)
    assert store.runs.spec(job.uuid, second.fence).resume is None
    assert [record.step for record in store.telemetry.steps(job.uuid)] == [0]
    assert store.telemetry.segments(job.uuid) == [before]
    again = write_segment(store, job.uuid, [completion(0, 0, phase="eval", completion="new")], name="-2")
    report_step(store, second, 0, metrics={"eval/total_reward": 0.25}, segments=[again])
    assert store.telemetry.metrics(job.uuid).keys() == {"eval/total_reward"}
    assert store.telemetry.segments(job.uuid) == [again]


def test_the_best_checkpoint_is_the_last_that_was_and_the_newest_state_is_resumed(store: Store) -> None:
    job = create_job(store)
    claimed = claim(store)
    for number, best in enumerate([True, True, False, False], 1):
        report_checkpoint(store, claimed, number, number * 5, best=best, eval_reward=number / 10)
    version = store.registry.get_version("math", 1)
    assert [(saved.checkpoint, saved.best) for saved in version.checkpoints] == [
        (1, False),
        (2, True),
        (3, False),
        (4, False),
    ]
    assert told(store, claimed, "checkpoint")[1] == "checkpoint 2, held-out reward 0.2, the best so far"
    report_checkpoint(store, claimed, 5, 25, state_path="")
    store.runs.release(job.uuid, claimed.fence)
    resumed = claim(store)
    resume = store.runs.spec(job.uuid, resumed.fence).resume
    assert resume is not None and (resume.checkpoint, resume.step) == (4, 20)
    assert [saved.checkpoint for saved in store.registry.get_version("math", 1).checkpoints] == [1, 2, 3, 4]


def test_the_best_is_looked_for_since_the_newest_revision(store: Store) -> None:
    job = create_job(store)
    claimed = claim(store)

    def best() -> list[int]:
        return [saved.checkpoint for saved in store.registry.get_version("math", 1).checkpoints if saved.best]

    report_checkpoint(store, claimed, 1, 5, best=True, eval_reward=10.0)
    assert best() == [1]
    store.runs.add_revision(job.uuid, params("two"), [function("two")], "owner")
    assert best() == [1]
    event(store, claimed, "revision", revision=2, step=6)
    assert best() == []
    report_checkpoint(store, claimed, 2, 6, best=True, eval_reward=0.5)
    report_checkpoint(store, claimed, 3, 7, eval_reward=0.4)
    assert best() == [2]
    store.runs.add_revision(job.uuid, params("three"), [function("three")], "owner")
    event(store, claimed, "revision", revision=3, refused="it does not load")
    assert best() == [2]
    store.runs.add_revision(job.uuid, params("four"), [function("four")], "owner")
    event(store, claimed, "revision", revision=4, step=8)
    assert best() == []
    store.runs.fail_attempt(job.uuid, claimed.fence, "gone", 1)
    assert store.registry.get_version("math", 1).checkpoint == 3


def test_a_checkpoint_sent_again_changes_nothing(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    report_checkpoint(store, claimed, 1, 5)
    report_checkpoint(store, claimed, 1, 5)
    assert len(told(store, claimed, "checkpoint")) == 1
    with pytest.raises(ConfigError, match="is of step 5 and has other weights"):
        report_checkpoint(store, claimed, 1, 5, fingerprint="other")
    with pytest.raises(ConfigError, match="is of step 5 and has other weights"):
        report_checkpoint(store, claimed, 1, 4)


def test_a_regular_checkpoint_takes_the_place_of_one_made_on_yielding(store: Store) -> None:
    job = create_job(store)
    first = claim(store)
    report_step(store, first, 3)
    report_checkpoint(store, first, 1, 3)
    store.runs.release(job.uuid, first.fence)
    second = claim(store)
    assert store.runs.spec(job.uuid, second.fence).resume == wire.ResumePoint(
        step=3, checkpoint=1, state_path=f"jobs/{job.uuid}/states/1-step-3"
    )
    report_checkpoint(store, second, 1, 5)
    (saved,) = store.registry.get_version("math", 1).checkpoints
    assert (saved.step, saved.path) == (5, f"jobs/{job.uuid}/checkpoints/1-step-5")


def test_a_finish_serves_its_checkpoint_and_may_be_sent_again(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    with pytest.raises(ConfigError, match="cannot serve checkpoint 3: it was not reported"):
        finish(store, claimed, checkpoint=3)
    report_checkpoint(store, claimed, 1, 5)
    first = finish(store, claimed, checkpoint=1)
    events = store.runs.events(claimed.uuid)
    assert finish(store, claimed, checkpoint=1) == first and store.runs.events(claimed.uuid) == events
    assert events[-1].message == "completed, serving checkpoint 1"
    with pytest.raises(Conflict):
        finish(store, claimed, "canceled")


def test_an_error_ends_the_job_with_its_sentence(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    with pytest.raises(ConfigError, match="an errored job says why"):
        finish(store, claimed, "errored")
    finish(store, claimed, "errored", error="reward 'exact' keeps failing")
    job = store.runs.get(claimed.uuid)
    assert (job.status, job.error) == ("errored", "reward 'exact' keeps failing")


def test_a_pause_lasts_until_somebody_ends_it(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    assert event(store, claimed, "paused", "60 % of the calls failed", step=3).paused
    event(store, claimed, "paused", "60 % of the calls failed", step=3)
    assert told(store, claimed, "paused") == ["60 % of the calls failed"]
    assert store.runs.get(claimed.uuid).paused_reason == "60 % of the calls failed"
    assert store.runs.get(claimed.uuid).status == "training"
    store.runs.request(claimed.uuid, "resume")
    heartbeat = wire.Heartbeat(fence=claimed.fence)
    assert not store.runs.heartbeat(claimed.uuid, heartbeat, LEASE).paused
    with pytest.raises(Conflict, match="is not paused"):
        store.runs.request(claimed.uuid, "resume")
    event(store, claimed, "paused", "again")
    store.runs.add_revision(claimed.uuid, params(), [function("better")], "owner")
    control = store.runs.heartbeat(claimed.uuid, heartbeat, LEASE)
    assert (control.paused, control.revision) == (False, 2)
    event(store, claimed, "paused", "once more")
    finish(store, claimed)
    assert store.runs.get(claimed.uuid).paused_reason is None
    with pytest.raises(Conflict, match="has ended"):
        store.runs.request(claimed.uuid, "resume")


def test_a_pause_outlives_the_process(store: Store) -> None:
    job = create_job(store)
    claimed = claim(store)
    event(store, claimed, "paused", "failing")
    store.runs.release(job.uuid, claimed.fence)
    assert report_step(store, claim(store), 1).paused


def test_a_warning_sent_again_is_told_once(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    for step in (1, 1, None, None, 2):
        event(store, claimed, "warning", "slow", step=step)
    assert told(store, claimed, "warning") == ["slow", "slow", "slow"]


def test_a_revision_is_taken_up_or_refused(store: Store) -> None:
    job = create_job(store)
    claimed = claim(store)
    added = store.runs.add_revision(job.uuid, params("two"), [function("two")], "owner")
    assert (added.revision, added.effective_step, added.created_by) == (2, None, "owner")
    assert report_step(store, claimed, 5).revision == 2
    event(store, claimed, "revision", "revision 2 from step 6", revision=2, step=6)
    event(store, claimed, "revision", "revision 2 from step 6", revision=2, step=6)
    assert told(store, claimed, "revision") == ["revision 2 by owner: two", "revision 2 from step 6"]
    store.runs.add_revision(job.uuid, params("three"), [function("three")], "owner")
    assert store.runs.get(job.uuid).params == params("three")
    control = event(store, claimed, "revision", "refused", revision=3, refused="it does not load")
    assert control.revision == 2
    assert (store.runs.get(job.uuid).revision, store.runs.get(job.uuid).params) == (2, params("two"))
    kept = store.runs.revisions(job.uuid)
    assert [(one.revision, one.effective_step, one.refused) for one in kept] == [
        (1, 1, None),
        (2, 6, None),
        (3, None, "it does not load"),
    ]
    assert store.runs.revision(job.uuid, 2) == kept[1]
    assert store.runs.add_revision(job.uuid, params(), [function("four")], "owner").revision == 4
    with pytest.raises(NotFound, match="has no revision 5"):
        store.runs.revision(job.uuid, 5)


def test_reports_about_revisions_that_say_nothing_are_refused(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    for fields in ({}, {"revision": 1}, {"revision": 1, "refused": "no"}):
        with pytest.raises(ConfigError):
            event(store, claimed, "revision", **fields)
    with pytest.raises(NotFound):
        event(store, claimed, "revision", revision=2, step=1)


def test_a_job_that_has_ended_takes_no_revision(store: Store) -> None:
    create_job(store)
    claimed = claim(store)
    finish(store, claimed)
    with pytest.raises(Conflict, match=r"has ended \(completed\); its reward functions cannot change"):
        store.runs.add_revision(claimed.uuid, params(), [function()], "owner")


def test_a_refused_report_does_not_extend_the_lease(store: Store) -> None:
    create_job(store)
    claimed = store.runs.claim("host", -1)
    assert claimed is not None
    with pytest.raises(ConfigError):
        store.runs.report_step(claimed.uuid, step_report(claimed, 1, metrics={"loss": float("nan")}), LEASE)
    assert store.runs.live()[0].expired
