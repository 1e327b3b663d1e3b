"""Listing, steering and reading jobs over HTTP."""

import pytest
from server.running import Running

from rewardsmith.jobs.local import log_file

JOBS = "/v2/finetuning/jobs"


def test_jobs_are_listed_newest_first_in_pages(api: Running):
    uuids = [api.queued_job() for _ in range(3)]
    api.http.post(f"{JOBS}/{uuids[0]}/cancel").raise_for_status()
    page = api.http.get(f"{JOBS}?limit=2").json()
    assert [job["uuid"] for job in page["data"]["jobs"]] == [uuids[2], uuids[1]]
    following = api.http.get(f"{JOBS}?limit=2&after={page['next']}").json()
    assert following["data"]["jobs"][0]["uuid"] == uuids[0]
    canceled = api.http.get(f"{JOBS}?status=canceled&repo=sums").json()["data"]["jobs"]
    assert [job["uuid"] for job in canceled] == [uuids[0]]
    assert api.http.get(f"{JOBS}?repo=no-such-repo").json()["data"]["jobs"] == []


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "status=done", "after=nonsense"])
def test_a_list_that_cannot_be_is_refused(api: Running, query: str):
    assert api.http.get(f"{JOBS}?{query}").status_code in (400, 422)


def test_a_queued_job_is_canceled_at_once(api: Running):
    uuid = api.queued_job()
    assert api.http.post(f"{JOBS}/{uuid}/cancel").json()["status"] == "canceled"
    assert api.http.post(f"{JOBS}/{uuid}/cancel").status_code == 200
    assert api.http.post(f"{JOBS}/{uuid}/stop").status_code == 409
    timeline = api.http.get(f"{JOBS}/{uuid}/timeline").json()
    assert set(timeline) == {"queued", "canceled"}
    assert timeline["queued"]["startedAt"] <= timeline["canceled"]["startedAt"]


def test_unknown_jobs_are_not_found(api: Running):
    for path in ("", "/timeline", "/events", "/revisions", "/metrics", "/completions", "/reward-logs", "/log"):
        assert api.http.get(f"{JOBS}/no-such-job{path}").status_code == 404, path
    for action in ("cancel", "stop", "resume"):
        assert api.http.post(f"{JOBS}/no-such-job/{action}").status_code == 404
    assert api.http.get(f"{JOBS}/no-such-job/events/stream").status_code == 404
    assert api.http.get(f"{JOBS}/no-such-job/tensorboard_logs").status_code == 404


def test_what_the_stock_sdk_asks_in_passing_is_answered(api: Running):
    body = {"baseModel": "countdown-tiny", "datasetName": "rows", "taskType": "grpo", "epochs": None}
    assert api.http.request("GET", f"{JOBS}/cost-estimate", json=body).json() == {"estimatedCost": 0}
    assert api.http.get(f"{JOBS}/{api.queued_job()}/tensorboard_logs").json() == {"files": [], "more": False}


@pytest.mark.parametrize("path", ["completions", "reward-logs"])
def test_a_filter_that_can_find_nothing_is_refused(api: Running, path: str):
    job = f"{JOBS}/{api.queued_job()}"
    (function,) = api.http.get(job).json()["params"]["rewardFns"]["functions"]
    url = f"{job}/{path}"
    assert api.http.get(url, params={"function": function, "outcome": "timeout"}).status_code == 200
    answer = api.http.get(url, params={"function": "lenght"})
    assert answer.status_code == 400
    assert f"no reward function 'lenght'; it has {function}" in answer.json()["error"]
    assert api.http.get(url, params={"outcome": "nope"}).status_code in (400, 422)


def test_a_job_without_completions_has_an_empty_page(api: Running):
    uuid = api.queued_job()
    for path in ("completions", "reward-logs"):
        assert api.http.get(f"{JOBS}/{uuid}/{path}").json() == {"data": [], "next": None}
        assert api.http.get(f"{JOBS}/{uuid}/{path}?limit=501").status_code == 422
        assert api.http.get(f"{JOBS}/{uuid}/{path}?order=best").status_code == 422


def test_the_log_of_an_attempt_is_read_from_its_end(api: Running):
    claim, _ = api.claimed_job()
    log = log_file(api.config.home, claim.uuid, 1)
    assert api.http.get(f"{JOBS}/{claim.uuid}/log").text == ""
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {number}\n" for number in range(20_000)))
    answer = api.http.get(f"{JOBS}/{claim.uuid}/log?attempt=1")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert lines[-1] == "line 19999" and 1000 < len(lines) < 20_000 and lines[0].startswith("line ")
    assert api.http.get(f"{JOBS}/{claim.uuid}/log?attempt=2").status_code == 404
    assert api.http.get(f"{JOBS}/{claim.uuid}/log?attempt=../../owner-token").status_code == 422
