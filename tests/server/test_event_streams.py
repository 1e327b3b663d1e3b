"""The event stream and the metrics websocket: history, what follows, resumption, the end."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from processes import wait_until
from server.running import TOKEN, Running
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

JOBS = "/v2/finetuning/jobs"
Frame = tuple[str, str, dict[str, Any]]


@contextmanager
def stream(api: Running, uuid: str, last_id: str | None = None) -> Iterator[Iterator[Frame]]:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    with api.http.stream("GET", f"{JOBS}/{uuid}/events/stream", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield frames(answer.iter_lines())


def frames(lines: Iterator[str]) -> Iterator[Frame]:
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield fields["event"], fields["id"], json.loads(fields["data"])
            fields = {}


def until(told: Iterator[Frame], event: str) -> Frame:
    return next(frame for frame in told if frame[0] == event)


def test_history_then_live_then_the_end(api: Running):
    claim, journal = api.claimed_job()
    journal.step(1, loss=0.5)
    with stream(api, claim.uuid) as told:
        kind, _, job = next(told)
        assert (kind, job["status"], job["uuid"]) == ("job", "training", claim.uuid)
        first = until(told, "step")[2]
        assert first == {"step": 1, "epoch": 0.25, "metrics": {"total_reward": 0.1, "loss": 0.5}}
        journal.step(2)
        assert until(told, "step")[2]["step"] == 2
        journal.post("event", kind="warning", message="look out", step=2)
        assert until(told, "event")[2]["message"] == "look out"
        journal.post("finish", status="completed")
        rest = list(told)
    assert rest[-1][0] == "job" and rest[-1][2]["status"] == "completed"


def test_a_client_that_comes_back_misses_nothing_and_hears_nothing_twice(api: Running):
    claim, journal = api.claimed_job()
    for step in (1, 2):
        journal.step(step)
    with stream(api, claim.uuid) as told:
        heard = [next(told)]
        while heard[-1][0] != "step":
            heard.append(next(told))
    journal.step(3)
    journal.post("finish", status="completed")
    with stream(api, claim.uuid, last_id=heard[-1][1]) as told:
        rest = list(told)
    steps = [data["step"] for kind, _, data in heard + rest if kind == "step"]
    events = [data["id"] for kind, _, data in heard + rest if kind == "event"]
    assert steps == [1, 2, 3]
    assert events == sorted(set(events)) and len(events) == len(api.store.runs.events(claim.uuid))
    assert rest[-1][2]["status"] == "completed"
    with stream(api, claim.uuid, last_id=rest[-1][1]) as told:
        assert [kind for kind, _, _ in told] == ["job"]


def test_steps_that_a_restart_took_back_are_told_again(api: Running):
    claim, journal = api.claimed_job()
    journal.step(1)
    journal.step(2)
    with stream(api, claim.uuid) as told:
        assert [until(told, "step")[2]["step"], until(told, "step")[2]["step"]] == [1, 2]
        api.store.runs.release(claim.uuid, claim.fence)
        again = api.store.runs.claim("test-host", 60)
        assert again and again.uuid == claim.uuid
        retried = type(journal)(api, again)
        assert next(frame for frame in told if frame[2].get("kind") == "restarted")
        retried.step(1)
        assert until(told, "step")[2]["step"] == 1
        retried.post("finish", status="completed")
        list(told)


@pytest.mark.parametrize("last_id", ["nonsense", "1", "1.2.3", "-5.1", "99999999999.1"])
def test_a_last_event_id_from_elsewhere_is_refused(api: Running, last_id: str):
    uuid = api.queued_job()
    answer = api.http.get(f"{JOBS}/{uuid}/events/stream", headers={"Last-Event-ID": last_id})
    assert answer.status_code == 400 and "Last-Event-ID" in answer.json()["error"]


def metrics_address(api: Running, uuid: str) -> str:
    return api.url.replace("http", "ws") + f"{JOBS}/{uuid}/metrics/stream"


HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def test_every_connection_to_the_metrics_replays_the_history(api: Running):
    claim, journal = api.claimed_job()
    rewards = {"total_reward_std": 0.5, "reward/length/mean": 0.1, "reward/length/std": 9.0, "learning_rate": 1e-5}
    journal.step(1, **rewards)
    for _ in range(2):
        with connect(metrics_address(api, claim.uuid), additional_headers=HEADERS) as socket:
            message = json.loads(socket.recv(timeout=10))
        assert message["data"]["steps"] == 1
        assert message["data"]["learning_rate"] == 1e-5
        assert message["data"]["epoch"] == 0, "the stock SDK reads an integer"
        assert message["data"]["grpo_train_rewards"] == {"total_reward": 0.1, "total_reward_std": 0.5, "length": 0.1}
        expected = {"model_uuid": claim.uuid, "is_completed": False, "steps": 1, "total_steps": 3, "steps_per_epoch": 4}
        assert expected.items() <= message["meta"].items()
    with connect(metrics_address(api, claim.uuid), additional_headers=HEADERS) as socket:
        assert json.loads(socket.recv(timeout=10))["data"]["steps"] == 1
        journal.step(2)
        assert json.loads(socket.recv(timeout=10))["data"]["steps"] == 2
        journal.post("finish", status="completed")
        last = json.loads(socket.recv(timeout=10))
        assert last["meta"]["is_completed"] is True
        assert list(socket) == []  # closed in order


def test_the_metrics_of_a_job_that_never_ran_end_at_once(api: Running):
    uuid = api.queued_job()
    api.http.post(f"{JOBS}/{uuid}/cancel").raise_for_status()
    with connect(metrics_address(api, uuid), additional_headers=HEADERS) as socket:
        message = json.loads(socket.recv(timeout=10))
    assert message["meta"]["is_completed"] is True and message["data"]["steps"] == 0


def test_the_metrics_of_an_unknown_job_are_refused(api: Running):
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(metrics_address(api, "no-such-job"), additional_headers=HEADERS),
    ):
        pass
    assert refused.value.response.status_code == 404


def test_a_stream_ends_when_its_client_goes(api: Running):
    claim, _ = api.claimed_job()
    with connect(metrics_address(api, claim.uuid), additional_headers=HEADERS):
        pass
    with stream(api, claim.uuid) as told:
        next(told)
    # Nothing is left that would keep the server from answering others.
    wait_until(lambda: api.http.get("/health").status_code == 200, "the server answers")
