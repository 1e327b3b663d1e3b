"""PUT .../config: reward functions change while a job runs, and nothing else does."""

from typing import Any

import pytest
from server.running import LENGTH, Running, encoded

SHORT = "def short(prompt, completion, example):\n    return -len(completion)\n"


def config_of(api: Running, uuid: str) -> dict[str, Any]:
    return api.http.get(f"/v2/finetuning/jobs/{uuid}").json()["params"]


def put(api: Running, uuid: str, config: dict[str, Any]) -> Any:
    return api.http.put(f"/v2/finetuning/jobs/{uuid}/config", json=config)


def names(api: Running, uuid: str) -> list[list[str]]:
    revisions = api.http.get(f"/v2/finetuning/jobs/{uuid}/revisions").json()
    return [[function["name"] for function in revision["functions"]] for revision in revisions]


def test_a_new_set_becomes_the_next_revision_and_the_job_is_told(api: Running):
    claim, journal = api.claimed_job()
    config = config_of(api, claim.uuid)
    config["rewardFns"]["functions"]["short"] = {"encodedFn": encoded(SHORT)}
    answer = put(api, claim.uuid, config)
    assert answer.status_code == 200
    assert (answer.json()["revision"], answer.json()["effectiveStep"]) == (2, None)
    assert journal.post("heartbeat").json()["revision"] == 2
    told = journal.get("revisions/2").json()
    assert [function["name"] for function in told["functions"]] == ["length", "short"]
    assert told["functions"][1]["source"] == SHORT
    assert names(api, claim.uuid) == [["length"], ["length", "short"]]
    assert list(config_of(api, claim.uuid)["rewardFns"]["functions"]) == ["length", "short"]


def test_what_the_stock_sdk_sends_back_changes_only_what_its_user_changed(api: Running):
    """It sends every field, None for those it does not know, and of a reward function the source alone."""
    claim, _ = api.claimed_job()
    config = config_of(api, claim.uuid)
    config["rewardFns"]["functions"]["length"]["weight"] = 3.0
    assert put(api, claim.uuid, config).status_code == 200
    stock = {
        "base_model": "countdown-tiny",
        "adapter": None,
        "task": "grpo",
        "train_steps": 3,
        "lr_scheduler": None,
        "sampling_params": {"temperature": None, "top_p": None, "top_k": None, "max_tokens": 32},
        "rewardFns": {
            "runtime": None,
            "functions": {"length": {"encodedFn": encoded(LENGTH)}, "short": {"encodedFn": encoded(SHORT)}},
        },
        "secrets": None,
    }
    assert put(api, claim.uuid, stock).status_code == 200
    weights = [f["weight"] for f in api.http.get(f"/v2/finetuning/jobs/{claim.uuid}/revisions").json()[-1]["functions"]]
    assert weights == [3.0, 1.0]


def test_an_unchanged_set_makes_no_revision(api: Running):
    claim, journal = api.claimed_job()
    for config in (config_of(api, claim.uuid), {}, {"train_steps": 3}):
        assert put(api, claim.uuid, config).status_code == 204
    assert journal.post("heartbeat").json()["revision"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"sampling_params": {"max_tokens": 8}}, "sampling_params.max_tokens"),
        ({"train_steps": 9, "rank": 2}, "rank, train_steps"),
        ({"lr_scheduler": {"type": "cosine"}}, "lr_scheduler.type"),
        ({"learning_rat": 0.5}, "did you mean 'learning_rate'"),
    ],
)
def test_every_other_field_is_refused_by_name_and_nothing_changes(api: Running, change: dict[str, Any], says: str):
    claim, _ = api.claimed_job()
    config = config_of(api, claim.uuid)
    config["rewardFns"]["functions"]["short"] = {"encodedFn": encoded(SHORT)}
    answer = put(api, claim.uuid, config | change)
    assert answer.status_code == 400 and says in answer.json()["error"]
    assert names(api, claim.uuid) == [["length"]]


def test_a_broken_set_changes_nothing(api: Running):
    claim, journal = api.claimed_job()
    config = config_of(api, claim.uuid)
    for functions in ({}, {"bad": {"encodedFn": "ZGVmIGJhZCg6"}}):
        config["rewardFns"]["functions"] = functions
        assert put(api, claim.uuid, config).status_code == 400
    assert journal.post("heartbeat").json()["revision"] == 1


def test_a_job_that_has_ended_keeps_its_rewards(api: Running):
    uuid = api.queued_job()
    api.http.post(f"/v2/finetuning/jobs/{uuid}/cancel").raise_for_status()
    answer = put(api, uuid, {})
    assert answer.status_code == 409 and "canceled" in answer.json()["error"]
    assert put(api, "no-such-job", {}).status_code == 404
    assert put(api, uuid, []).status_code == 422  # type: ignore[arg-type]
