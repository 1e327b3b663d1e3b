"""The journal: what a job process reads, reports and is told."""

import pytest
from server.running import Running

from rewardsmith import wire


def test_a_job_is_told_all_it_needs(api: Running):
    claim, journal = api.claimed_job()
    spec = wire.JobSpec.model_validate(journal.get("spec").json())
    assert (spec.uuid, spec.fence, spec.attempt) == (claim.uuid, claim.fence, 1)
    assert spec.params["base_model"] == "countdown-tiny"
    assert spec.base_model_source.endswith("model")
    assert spec.artifacts_url.startswith("file://")
    assert [function.name for function in spec.revision.functions] == ["length"]
    assert journal.get("revisions/1").json() == spec.revision.model_dump(mode="json", by_alias=True)
    assert journal.get("revisions/9").status_code == 404
    assert journal.get("revisions/99999999999999999999").status_code == 422


def test_a_report_shows_in_the_job_and_the_same_report_again_changes_nothing(api: Running):
    claim, journal = api.claimed_job()
    for _ in range(2):
        assert journal.step(1, loss=0.25).json() == {"action": "continue", "paused": False, "revision": 1}
    job = api.http.get(f"/v2/finetuning/jobs/{claim.uuid}").json()
    assert (job["step"], job["totalSteps"], job["stepsPerEpoch"], job["totalReward"]) == (1, 3, 4, 0.1)
    series = api.http.get(f"/v2/finetuning/jobs/{claim.uuid}/metrics").json()["series"]
    assert series == {"loss": [{"step": 1, "value": 0.25}], "total_reward": [{"step": 1, "value": 0.1}]}
    journal.step(2, loss=0.125)
    path = f"/v2/finetuning/jobs/{claim.uuid}/metrics?series=loss&after_step=1"
    assert api.http.get(path).json()["series"] == {"loss": [{"step": 2, "value": 0.125}]}


def test_numbers_that_are_none_are_refused(api: Running):
    _, journal = api.claimed_job()
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = (
            f'{{"fence": {journal.claim.fence}, "step": 1, "epoch": 0, "totalSteps": 1, "stepsPerEpoch": 1, '
            f'"revision": 1, "metrics": {{"loss": {number}}}}}'
        )
        url = f"/v2/journal/{journal.claim.uuid}/report"
        headers = {**journal.headers, "Content-Type": "application/json"}
        assert api.anyone.post(url, content=body, headers=headers).status_code in (400, 422)
    for answer in (journal.step(10**30), journal.post("event", kind="info", message="m", step=10**30)):
        assert answer.status_code == 400 and "too large" in answer.json()["error"]


def test_a_request_to_stop_reaches_the_job(api: Running):
    claim, journal = api.claimed_job()
    stopping = api.http.post(f"/v2/finetuning/jobs/{claim.uuid}/stop").json()
    assert stopping["status"] == "stopping"
    assert journal.post("heartbeat").json()["action"] == "stop"
    assert journal.post("finish", status="stopped").status_code == 200
    assert journal.post("finish", status="stopped").status_code == 200
    assert api.http.get(f"/v2/finetuning/jobs/{claim.uuid}").json()["status"] == "stopped"


def test_a_pause_is_shown_and_ended_by_resume(api: Running):
    claim, journal = api.claimed_job()
    assert api.http.post(f"/v2/finetuning/jobs/{claim.uuid}/resume").status_code == 409
    assert journal.post("event", kind="paused", message="length keeps failing", step=2).json()["paused"] is True
    job = api.http.get(f"/v2/finetuning/jobs/{claim.uuid}").json()
    assert (job["status"], job["pausedReason"]) == ("training", "length keeps failing")
    api.http.post(f"/v2/finetuning/jobs/{claim.uuid}/resume").raise_for_status()
    assert journal.post("heartbeat").json()["paused"] is False
    kinds = [event["kind"] for event in api.http.get(f"/v2/finetuning/jobs/{claim.uuid}/events").json()]
    assert "paused" in kinds and "resumed" in kinds


def test_an_old_attempt_is_told_to_stop_and_writes_nothing(api: Running):
    claim, old = api.claimed_job()
    api.store.runs.release(claim.uuid, claim.fence)
    while (again := api.store.runs.claim("test-host", 60)) and again.uuid != claim.uuid:
        pass
    assert again and again.fence == claim.fence + 1
    for answer in (old.get("spec"), old.post("heartbeat"), old.step(1), old.post("finish", status="completed")):
        assert answer.status_code == 409, answer.text
    job = api.store.runs.get(claim.uuid)
    assert (job.status, job.step) == ("training", 0)


def test_a_fence_that_is_not_the_tokens_is_refused(api: Running):
    claim, journal = api.claimed_job()
    assert journal.post("heartbeat", fence=claim.fence + 1).status_code == 403


@pytest.mark.parametrize("path", ["heartbeat", "report", "checkpoint", "event", "finish"])
def test_malformed_reports_are_refused(api: Running, path: str):
    _, journal = api.claimed_job()
    assert journal.post(path, nonsense=1).status_code == 422
