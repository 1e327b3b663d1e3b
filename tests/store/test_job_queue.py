import json
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stored import (
    LEASE,
    claim,
    create_job,
    finish,
    function,
    open_store,
    report_checkpoint,
    report_step,
)

from rewardsmith import wire
from rewardsmith.errors import ConfigError, Conflict, NotFound
from rewardsmith.store import Claim, Store, jobqueue

CLAIM_ALL = """
import json, sys
from rewardsmith.store import Store
store = Store(sys.argv[1], sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
claimed = []
while (one := store.runs.claim("process", 60)) is not None:
    claimed.append([one.uuid, one.fence, one.attempt])
print(json.dumps(claimed))
"""


def status(store: Store, uuid: str) -> str:
    return store.runs.get(uuid).status


def messages(store: Store, uuid: str) -> list[str]:
    return [event.message for event in store.runs.events(uuid)]


def test_a_new_job_waits_in_the_queue(store: Store) -> None:
    job = create_job(store, description="try")
    assert (job.status, job.step, job.attempt, job.revision, job.description) == ("queued", 0, 0, 1, "try")
    assert (job.target_repo_name, job.target_version_tag, job.dataset_name) == ("math", 1, "rows")
    assert store.runs.get(job.uuid) == job
    assert messages(store, job.uuid) == ["queued"]
    assert store.registry.get_version("math", 1).status == "queued"
    assert store.runs.live() == []


def test_a_job_of_things_that_are_not_there_leaves_no_version(store: Store) -> None:
    create_job(store)
    for changes in ({"repo": "none"}, {"dataset": "none"}, {"continue_from": "math/9"}, {"continue_from": "math/1"}):
        request = {"repo": "math", "dataset": "rows"} | changes
        with pytest.raises(NotFound):
            store.runs.create_job(
                user_id=1, base_model="m", base_model_source="o/m", params={}, functions=[function()], **request
            )
    assert [version.tag for version in store.registry.get_repo("math").all_versions] == [1]
    assert create_job(store).target_version_tag == 2


def test_an_idempotency_key_gives_the_first_job_again(store: Store) -> None:
    first = create_job(store, idempotency_key="k", body_sha256="a" * 64)
    assert create_job(store, idempotency_key="k", body_sha256="a" * 64) == first
    assert store.runs.find_repeat(1, "k", "a" * 64) == first
    assert store.runs.find_repeat(1, "other", "a" * 64) is None
    assert store.runs.find_repeat(2, "k", "a" * 64) is None
    with pytest.raises(Conflict, match="Idempotency-Key 'k' came before with another job"):
        create_job(store, idempotency_key="k", body_sha256="b" * 64)
    finish(store, claim(store))
    assert create_job(store, idempotency_key="k", body_sha256="a" * 64).uuid == first.uuid
    assert len(store.runs.list()[0]) == 1


def test_without_a_key_the_same_body_gives_the_first_job_while_it_lives(store: Store) -> None:
    first = create_job(store, body_sha256="a" * 64)
    assert create_job(store, body_sha256="a" * 64) == first
    assert create_job(store, body_sha256="b" * 64) != first
    assert create_job(store, idempotency_key="k", body_sha256="a" * 64) != first
    store.runs.request(first.uuid, "cancel")
    assert create_job(store, body_sha256="a" * 64) != first


def test_the_same_body_half_a_minute_later_is_another_job(store: Store, tmp_path: Path) -> None:
    first = create_job(store, body_sha256="a" * 64)
    with sqlite3.connect(tmp_path / "db" / "rewardsmith.sqlite") as database:
        database.execute("UPDATE jobs SET created_at = '2026-01-01 00:00:00.000000'")
    database.close()
    assert store.runs.find_repeat(1, None, "a" * 64) is None
    assert create_job(store, body_sha256="a" * 64) != first


def test_one_key_sent_by_many_threads_makes_one_job(store: Store) -> None:
    create_job(store)
    made: list[str] = []
    start = threading.Barrier(8)

    def send() -> None:
        start.wait()
        made.append(create_job(store, idempotency_key="k", body_sha256="a" * 64).uuid)

    _together(send, 8)
    assert len(made) == 8 and len(set(made)) == 1


def _together(work: object, count: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_threads_claim_every_job_once(store: Store) -> None:
    jobs = {create_job(store).uuid for _ in range(40)}
    claims: list[Claim] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        while (claimed := store.runs.claim("host", LEASE)) is not None:
            claims.append(claimed)

    _together(work, 8)
    assert len(claims) == 40 and {claimed.uuid for claimed in claims} == jobs
    assert len({claimed.token for claimed in claims}) == 40


@pytest.mark.slow
def test_processes_claim_every_job_once(store: Store, tmp_path: Path) -> None:
    jobs = {create_job(store).uuid for _ in range(60)}
    arguments = [f"sqlite:///{tmp_path / 'db' / 'rewardsmith.sqlite'}", store.artifacts.url]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM_ALL, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    outputs = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    for worker in workers:
        outputs.append(json.loads(worker.communicate(timeout=60)[0]))
    claims = [claimed for output in outputs for claimed in output]
    assert len(claims) == 60 and {uuid for uuid, _, _ in claims} == jobs
    assert all((fence, attempt) == (1, 1) for _, fence, attempt in claims)


def test_jobs_are_claimed_in_the_order_they_came(store: Store) -> None:
    jobs = [create_job(store).uuid for _ in range(3)]
    assert [claim(store).uuid for _ in range(3)] == jobs
    assert store.runs.claim("host", LEASE) is None


def test_a_claim_is_a_live_job_with_a_lease_and_a_handle(store: Store) -> None:
    job = create_job(store)
    claimed = store.runs.claim("here", -1)
    assert claimed is not None and (claimed.uuid, claimed.fence, claimed.attempt) == (job.uuid, 1, 1)
    store.runs.set_handle(job.uuid, 1, "123:456")
    (live,) = store.runs.live()
    assert (live.uuid, live.status, live.host, live.handle, live.fence) == (job.uuid, "training", "here", "123:456", 1)
    assert live.expired and live.lease_until.utcoffset() is not None
    store.runs.extend_leases(60)
    assert not store.runs.live()[0].expired
    store.runs.extend_leases(-1)
    store.runs.heartbeat(job.uuid, wire.Heartbeat(fence=1), 60)
    assert not store.runs.live()[0].expired
    with pytest.raises(Conflict, match="fence 2 does not hold"):
        store.runs.set_handle(job.uuid, 2, "x")
    finish(store, claimed)
    store.runs.set_handle(job.uuid, 1, "late")


def test_only_the_holder_of_the_fence_may_write(store: Store) -> None:
    job = create_job(store)
    old = claim(store)
    store.runs.fail_attempt(job.uuid, old.fence, "killed", 5)
    _refused(store, old, "status queued")
    store.runs.extend_leases(60)
    new = _claim_after_backoff(store)
    assert (new.fence, new.attempt) == (2, 2)
    before = store.runs.get(job.uuid), store.runs.events(job.uuid), store.telemetry.metrics(job.uuid)
    _refused(store, old, "fence 1 does not hold job .* fence 2")
    assert (store.runs.get(job.uuid), store.runs.events(job.uuid), store.telemetry.metrics(job.uuid)) == before
    report_step(store, new, 1)
    finish(store, new)
    _refused(store, new, r"has ended \(completed\)")
    assert status(store, job.uuid) == "completed"


def _refused(store: Store, claimed: Claim, why: str) -> None:
    uuid, fence = claimed.uuid, claimed.fence
    event = wire.EventReport(fence=fence, kind="paused", message="x")
    writes = [
        lambda: store.runs.heartbeat(uuid, wire.Heartbeat(fence=fence), LEASE),
        lambda: report_step(store, claimed, 1),
        lambda: report_checkpoint(store, claimed, 1, 1),
        lambda: store.runs.report_event(uuid, event, LEASE),
        lambda: finish(store, claimed, "errored", error="x"),
        lambda: store.runs.spec(uuid, fence),
        lambda: store.runs.release(uuid, fence),
        lambda: store.runs.fail_attempt(uuid, fence, "x", 3),
    ]
    for write in writes:
        with pytest.raises(Conflict, match=why):
            write()


def _claim_after_backoff(store: Store) -> Claim:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        claimed = store.runs.claim("host", LEASE)
        if claimed is not None:
            return claimed
        time.sleep(0.05)
    raise AssertionError("no job to claim")


def test_a_yielded_job_goes_back_without_a_failure(store: Store) -> None:
    job = create_job(store)
    for attempt in range(1, 8):
        claimed = claim(store)
        assert claimed.attempt == attempt
        assert store.runs.release(job.uuid, claimed.fence).status == "queued"
    assert store.runs.fail_attempt(job.uuid, claim(store).fence, "x", 2).status == "queued"


def test_a_failed_attempt_backs_off_and_says_why(store: Store) -> None:
    job = create_job(store)
    assert store.runs.fail_attempt(job.uuid, claim(store).fence, "killed by signal 9", 3).status == "queued"
    assert store.runs.claim("host", LEASE) is None
    assert messages(store, job.uuid)[-1] == "queued again for 1 s: attempt 1 failed: killed by signal 9"
    _claim_after_backoff(store)
    restarted = store.runs.events(job.uuid)[-1]
    assert (restarted.kind, restarted.step, restarted.message) == (
        "restarted",
        0,
        "training attempt 2 on host, after step 0",
    )


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobqueue, "LONGEST_BACKOFF_SECONDS", 0)


def test_attempts_without_a_new_step_use_up_the_tries(store: Store, no_backoff: None) -> None:
    job = create_job(store)
    claimed = claim(store)
    report_step(store, claimed, 1)
    report_checkpoint(store, claimed, 1, 1)
    report_step(store, claimed, 2)
    store.runs.fail_attempt(job.uuid, claimed.fence, "first", 2)
    claimed = claim(store)
    report_step(store, claimed, 2)  # taken back and done again: no step beyond those already reached
    ended = store.runs.fail_attempt(job.uuid, claimed.fence, "see the log", 2)
    assert ended.status == "errored"
    assert ended.error == "2 attempts in a row made no progress; the last one: see the log"
    assert store.registry.get_version("math", 1).checkpoint == 1


def test_a_new_step_gives_the_tries_back(store: Store, no_backoff: None) -> None:
    job = create_job(store)
    for step in range(1, 4):
        claimed = claim(store)
        report_step(store, claimed, step)
        report_checkpoint(store, claimed, step, step)
        assert store.runs.fail_attempt(job.uuid, claimed.fence, "x", 2).status == "queued"
    assert store.runs.fail_attempt(job.uuid, claim(store).fence, "x", 2).status == "errored"


def test_every_state_is_in_the_timeline(store: Store) -> None:
    job = create_job(store)
    claimed = claim(store)
    store.runs.request(job.uuid, "stop")
    finish(store, claimed, "stopped")
    timeline = store.runs.timeline(job.uuid)
    assert list(timeline) == ["queued", "training", "stopping", "stopped"]
    times = [entry["startedAt"] for entry in timeline.values()]
    assert times == sorted(times) and all(time.endswith("+00:00") for time in times)
    events = store.runs.events(job.uuid)
    assert [event.message for event in events] == [
        "queued",
        "training on host",
        "asked to stop",
        "stopped, without an adapter",
    ]
    assert store.runs.events(job.uuid, after=events[1].id) == events[2:]


def test_a_queued_job_is_canceled_at_once(store: Store) -> None:
    job = create_job(store)
    assert store.runs.request(job.uuid, "cancel").status == "canceled"
    assert store.runs.request(job.uuid, "cancel").status == "canceled"
    assert store.runs.claim("host", LEASE) is None
    with pytest.raises(Conflict, match=r"has ended \(canceled\); it cannot be stopped"):
        store.runs.request(job.uuid, "stop")


@pytest.mark.parametrize(("action", "ended"), [("cancel", "canceled"), ("stop", "stopped")])
def test_a_running_job_is_told_to_end(store: Store, action: str, ended: str) -> None:
    job = create_job(store)
    claimed = claim(store)
    assert report_step(store, claimed, 1).action == "continue"
    assert store.runs.request(job.uuid, action).status == "stopping"  # type: ignore[arg-type]
    assert store.runs.request(job.uuid, action).status == "stopping"  # type: ignore[arg-type]
    assert report_step(store, claimed, 2).action == action
    finish(store, claimed, ended)
    assert status(store, job.uuid) == ended
    assert store.runs.request(job.uuid, action).status == ended  # type: ignore[arg-type]


@pytest.mark.parametrize(("action", "ended"), [("cancel", "canceled"), ("stop", "stopped")])
@pytest.mark.parametrize("how", ["release", "fail"])
def test_a_job_that_was_to_end_does_not_start_again(store: Store, action: str, ended: str, how: str) -> None:
    job = create_job(store)
    claimed = claim(store)
    report_checkpoint(store, claimed, 1, 5, best=True)
    report_checkpoint(store, claimed, 2, 10)
    store.runs.request(job.uuid, action)  # type: ignore[arg-type]
    if how == "release":
        store.runs.release(job.uuid, claimed.fence)
    else:
        store.runs.fail_attempt(job.uuid, claimed.fence, "killed", 3)
    assert status(store, job.uuid) == ended
    assert store.registry.get_version("math", 1).checkpoint == (None if action == "cancel" else 1)
    assert store.runs.live() == []


def test_a_canceled_version_serves_nothing_and_keeps_its_checkpoints(store: Store) -> None:
    job = create_job(store)
    claimed = claim(store)
    report_checkpoint(store, claimed, 1, 5, best=True)
    store.runs.request(job.uuid, "cancel")
    finish(store, claimed, "canceled", checkpoint=1)
    version = store.registry.get_version("math", 1)
    assert (version.checkpoint, version.adapter_path) == (None, None)
    assert version.finetuning_job is not None and version.finetuning_job.error == "canceled by the user"
    with pytest.raises(NotFound, match=r"is canceled \(canceled by the user\); math/1@1 is its newest checkpoint"):
        store.registry.adapter_path("math", 1)
    assert store.registry.adapter_path("math", 1, 1).endswith("1-step-5")
    assert store.runs.events(job.uuid)[-1].message == "canceled, without an adapter"


def test_a_live_job_tells_how_long_it_has_been_asked_to_cancel(store: Store) -> None:
    job = create_job(store)
    claim(store)
    store.runs.request(job.uuid, "stop")
    assert store.runs.live()[0].canceling_seconds is None
    store.runs.request(job.uuid, "cancel")
    (live,) = store.runs.live()
    assert live.canceling_seconds is not None and 0 <= live.canceling_seconds < 60


def test_cancel_is_stronger_than_stop(store: Store) -> None:
    job = create_job(store)
    claimed = claim(store)
    store.runs.request(job.uuid, "stop")
    store.runs.request(job.uuid, "cancel")
    assert report_step(store, claimed, 1).action == "cancel"
    with pytest.raises(Conflict, match="is being canceled"):
        store.runs.request(job.uuid, "stop")


def test_a_finished_job_cannot_be_canceled(store: Store) -> None:
    job = create_job(store)
    finish(store, claim(store))
    with pytest.raises(Conflict, match=r"has ended \(completed\); it cannot be canceled"):
        store.runs.request(job.uuid, "cancel")
    with pytest.raises(NotFound, match="no job 'nobody'"):
        store.runs.request("nobody", "cancel")


def test_jobs_are_listed_page_by_page(store: Store) -> None:
    uuids = [create_job(store, repo="math" if n % 2 else "words").uuid for n in range(7)][::-1]
    seen, after = [], None
    while True:
        page, after = store.runs.list(limit=3, after=after)
        seen += [job.uuid for job in page]
        if after is None:
            break
        create_job(store, repo="later")
    assert seen == uuids
    store.runs.request(uuids[0], "cancel")
    assert [job.uuid for job in store.runs.list(status="canceled")[0]] == [uuids[0]]
    assert [job.uuid for job in store.runs.list(repo="math")[0]] == uuids[1::2]
    assert store.runs.list(repo="' OR 1=1 --") == ([], None)
    with pytest.raises(ConfigError, match="cursor"):
        store.runs.list(after="1; DROP TABLE jobs")


def test_a_reopened_store_has_everything(store: Store, tmp_path: Path) -> None:
    job = create_job(store)
    claimed = claim(store)
    report_step(store, claimed, 1)
    store.close()
    again = open_store(tmp_path)
    assert again.runs.live()[0].uuid == job.uuid
    assert again.registry.identify(claimed.token).fence == 1
    assert report_step(again, claimed, 2).action == "continue"
    again.close()
