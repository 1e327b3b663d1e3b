"""Revisions over HTTP: a change by name, its difference, going back. PUT .../config is in test_live_change."""

from typing import Any

import pytest
from server.running import LENGTH, Running, encoded

from rewardsmith.reward_config import RewardFunction

JOBS = "/v2/finetuning/jobs"
SHORT = "def short(prompt, completion, example):\n    return -len(completion)\n"
LONGER = LENGTH.replace("/ 10", "/ 20")


def post(api: Running, uuid: str, **change: Any) -> Any:
    return api.http.post(f"{JOBS}/{uuid}/revisions", json=change)


def made(api: Running, uuid: str, **change: Any) -> dict[str, Any]:
    answer = post(api, uuid, **change)
    assert answer.status_code == 200, answer.text
    return answer.json()


def roll_back(api: Running, uuid: str, to: int, **body: Any) -> Any:
    return api.http.post(f"{JOBS}/{uuid}/revisions/{to}/rollback", json=body)


def names(revision: dict[str, Any]) -> list[str]:
    return [function["name"] for function in revision["functions"]]


def test_what_is_named_changes_and_all_else_stays(api: Running):
    claim, journal = api.claimed_job()
    added = {"short": {"encodedFn": encoded(SHORT), "weight": 0.5, "on_error": "exclude"}}
    second = made(api, claim.uuid, functions=added, note="shorter answers", comparedSteps=3)
    assert (second["revision"], second["note"], second["createdBy"]) == (2, "shorter answers", "owner")
    assert (names(second), second["comparedSteps"]) == (["length", "short"], 3)
    assert journal.post("heartbeat").json()["revision"] == 2
    third = made(api, claim.uuid, functions={"short": {"encodedFn": encoded(SHORT.replace("-", "+"))}})
    assert (third["functions"][1]["weight"], third["functions"][1]["onError"]) == (0.5, "exclude"), "inherited"
    fourth = made(api, claim.uuid, remove=["length"], weights={"short": 2})
    assert (names(fourth), fourth["functions"][0]["weight"]) == (["short"], 2.0)
    assert fourth["functions"][0]["source"] == third["functions"][1]["source"]
    one = api.http.get(f"{JOBS}/{claim.uuid}/revisions/4").json()
    assert one == fourth == api.http.get(f"{JOBS}/{claim.uuid}/revisions").json()[-1]
    assert journal.get("revisions/4").json() == fourth


def test_a_change_of_nothing_makes_no_revision(api: Running):
    claim, _ = api.claimed_job()
    first = made(api, claim.uuid, weights={"length": 1.0}, note="nothing new")
    assert (first["revision"], first["note"]) == (1, None)
    second = made(api, claim.uuid, weights={"length": 0.5})
    assert made(api, claim.uuid, weights={"length": 0.5})["revision"] == second["revision"] == 2, "sent twice"


def test_weights_and_schedules_take_each_others_place(api: Running):
    claim, _ = api.claimed_job()
    (scheduled,) = made(api, claim.uuid, weights={"length": {"1": 0, "100": 2.5}})["functions"]
    assert (scheduled["weight"], scheduled["schedule"]) == (1.0, {"1": 0.0, "100": 2.5})
    config = api.http.get(f"{JOBS}/{claim.uuid}").json()["params"]
    stored = RewardFunction(**config["rewardFns"]["functions"]["length"])
    assert stored.schedule == {1: 0.0, 100: 2.5}
    assert api.http.put(f"{JOBS}/{claim.uuid}/config", json=config).status_code == 204
    # The stock SDK sends the source alone, and so changes no weight.
    config["rewardFns"]["functions"] = {"length": {"encodedFn": encoded(LONGER)}}
    (kept,) = api.http.put(f"{JOBS}/{claim.uuid}/config", json=config).json()["functions"]
    assert (kept["source"], kept["schedule"]) == (LONGER, {"1": 0.0, "100": 2.5})
    (fixed,) = made(api, claim.uuid, weights={"length": 3})["functions"]
    assert (fixed["weight"], fixed["schedule"]) == (3.0, None)
    (again,) = made(api, claim.uuid, weights={"length": {"5": 1}})["functions"]
    assert (again["weight"], again["schedule"]) == (1.0, {"5": 1.0})


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"remove": ["lenght"]}, 400, "no reward function 'lenght' to remove; the job has length"),
        ({"remove": ["length"]}, 400, "a run needs at least one"),
        ({"weights": {"short": 1}}, 400, "no reward function 'short' to weigh"),
        ({"weights": {"length": {"0": 1}}}, 400, "schedule"),
        ({"weights": {"length": {}}}, 400, "schedule"),
        ({"functions": {"length": {"encodedFn": "ZGVmIGJhZCg6"}}}, 400, "line 1"),
        ({"functions": {"length": {"encodedFn": "!"}}}, 400, "base64"),
        ({"functions": {"a": {"encodedFn": encoded(SHORT), "weight": 2, "schedule": {"1": 1}}}}, 400, "beside a sched"),
        ({"functions": {"length": {"encodedFn": encoded(SHORT)}}, "remove": ["length"]}, 400, "also given anew"),
        ({"runtime": {"pakages": []}}, 400, "did you mean 'packages'"),
        ({"functoins": {}}, 422, "functoins"),
        ({"note": "x" * 2001}, 422, "note"),
        ({"comparedSteps": -1}, 422, "comparedSteps"),
    ],
)
def test_what_cannot_be_is_refused_in_words_and_changes_nothing(
    api: Running, change: dict[str, Any], status: int, says: str
):
    claim, journal = api.claimed_job()
    answer = post(api, claim.uuid, **change)
    assert (answer.status_code, says in answer.json()["error"]) == (status, True), answer.text
    assert journal.post("heartbeat").json()["revision"] == 1


def test_a_diff_is_by_line_for_sources_and_by_name_for_settings(api: Running):
    claim, _ = api.claimed_job()
    path = f"{JOBS}/{claim.uuid}/revisions"
    made(api, claim.uuid, functions={"length": {"encodedFn": encoded(LONGER)}, "short": {"encodedFn": encoded(SHORT)}})
    made(api, claim.uuid, weights={"short": {"1": 0.5}}, remove=["length"])
    second = api.http.get(f"{path}/2/diff").json()
    assert (second["old"], second["new"]) == (1, 2)
    changed, added = second["functions"]
    assert (changed["name"], changed["change"], changed["settings"]) == ("length", "changed", [])
    assert changed["source"].splitlines() == [
        "--- length",
        "+++ length",
        "@@ -1,2 +1,2 @@",
        " def length(prompt, completion, example):",
        "-    return len(completion) / 10",
        "+    return len(completion) / 20",
    ]
    assert (added["change"], added["source"].splitlines()[:2]) == ("added", ["--- /dev/null", "+++ short"])
    against = api.http.get(f"{path}/3/diff?against=2").json()
    weighed, removed = against["functions"]
    assert (weighed["name"], weighed["change"], weighed["source"]) == ("short", "changed", "")
    assert weighed["settings"] == [{"name": "schedule", "old": None, "new": {"1": 0.5}}]
    assert (removed["name"], removed["change"]) == ("length", "removed")
    assert [f["change"] for f in api.http.get(f"{path}/1/diff").json()["functions"]] == ["added"]
    assert [f["change"] for f in api.http.get(f"{path}/1/diff?against=1").json()["functions"]] == ["same"]
    for nowhere in ("9/diff", "1/diff?against=9"):
        assert api.http.get(f"{path}/{nowhere}").status_code == 404


def test_a_rollback_is_a_new_revision_that_says_so(api: Running):
    claim, _ = api.claimed_job()
    made(api, claim.uuid, functions={"short": {"encodedFn": encoded(SHORT)}}, remove=["length"])
    third = roll_back(api, claim.uuid, 1, note="it was better").json()
    assert (third["revision"], third["note"]) == (3, "rollback to revision 1: it was better")
    first = api.http.get(f"{JOBS}/{claim.uuid}/revisions/1").json()
    assert (third["functions"], third["sha256"]) == (first["functions"], first["sha256"])
    assert list(api.http.get(f"{JOBS}/{claim.uuid}").json()["params"]["rewardFns"]["functions"]) == ["length"]
    assert roll_back(api, claim.uuid, 1).json()["revision"] == 3, "the job has these functions"
    assert roll_back(api, claim.uuid, 2).json()["note"] == "rollback to revision 2"
    assert roll_back(api, claim.uuid, 9).status_code == 404


def test_there_is_no_way_back_to_what_was_refused(api: Running):
    claim, journal = api.claimed_job()
    made(api, claim.uuid, functions={"short": {"encodedFn": encoded(SHORT)}})
    journal.post(
        "event", kind="revision", message="no", revision=2, refused="it does not load there"
    ).raise_for_status()
    answer = roll_back(api, claim.uuid, 2)
    assert answer.status_code == 409 and "it does not load there" in answer.json()["error"]


def test_a_job_that_has_ended_keeps_its_rewards(api: Running):
    uuid = api.queued_job()
    api.http.post(f"{JOBS}/{uuid}/cancel").raise_for_status()
    for answer in (post(api, uuid, weights={"length": 2}), roll_back(api, uuid, 1)):
        assert answer.status_code == 409 and "canceled" in answer.json()["error"]
    assert api.http.get(f"{JOBS}/{uuid}/revisions/1").status_code == 200


def test_of_two_changes_of_the_same_set_only_one_is_made(api: Running):
    """Both begin from revision 1; the second would take the first one's change back without knowing it."""
    claim, _ = api.claimed_job()
    job = api.store.runs.get(claim.uuid)
    made(api, claim.uuid, weights={"length": 2})
    with pytest.raises(Exception, match="changed meanwhile"):
        api.store.runs.add_revision(job.uuid, job.params, [], "owner", base=job.revision)


def test_reward_logs_can_be_filtered_and_folded(api: Running):
    claim, _ = api.claimed_job()
    url = f"{JOBS}/{claim.uuid}/reward-logs"
    query = {"function": "length", "revision": 1, "from_step": 1, "to_step": 9, "epoch": 1, "outcome": "timeout"}
    assert api.http.get(url, params=query | {"every": True, "text": "x"}).json() == {"data": [], "next": None}
    assert api.http.get(f"{url}/folded", params=query).json() == {"data": [], "others": 0, "next": None}
    for path in (url, f"{url}/folded"):
        assert "no reward function" in api.http.get(path, params={"function": "lenght"}).json()["error"]
        for wrong in ({"stepp": 1}, {"from_step": -1}, {"outcome": "bad"}, {"limit": 501}):
            assert api.http.get(path, params=wrong).status_code == 422, wrong
