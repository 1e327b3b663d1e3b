"""Dry runs on the real server, over segments as a job writes them."""

import threading
from typing import Any

import httpx
import pytest
from processes import wait_until
from server.running import LENGTH, Running, encoded, job_request
from store.stored import completion, report_step, write_segment

from rewardsmith.errors import Conflict
from rewardsmith.server import dry_run
from rewardsmith.store import Claim

JOBS = "/v2/finetuning/jobs"
RIGHT = """\
def right(prompt, completion, example):
    return 1.0 if completion == str(example["answer"]) else 0.0
"""
BROKEN = """\
def right(prompt, completion, example):
    return 1.0 / (len(completion) - 1)
"""
SLOW = "def slow(prompt, completion, example):\n    import time\n    time.sleep(1.5)\n    return 1.0\n"
ANSWERS = ["2 + 2 =", "3 + 5 ="]  # the prompts of the dataset's rows; their answers are 4 and 8


def a_job(api: Running, steps: int = 3, **params: Any) -> Claim:
    """A job in training that has drawn two completions of each row in every step; "length" gave them 0.5 and 0.6."""
    request = job_request(num_generations=2, effective_batch_size=4, **params)
    uuid = api.submit(request, **{"Idempotency-Key": f"dry-{len(api.jobs())}"}).json()["uuid"]
    while (claim := api.store.runs.claim("test-host", 60)) and claim.uuid != uuid:
        pass
    assert claim
    for step in range(1, steps + 1):
        commit(api, claim, step)
    return claim


def commit(api: Running, claim: Claim, step: int, texts: tuple[str, ...] = ("4", "nine", "8", "no"), **changes: Any):
    rows = []
    for idx, text in enumerate(texts):
        value = 0.5 + idx % 2 / 10
        scores = {"length": {"value": value, "outcome": "ok", "seconds": 0.25}}
        row = completion(step, idx, row=idx // 2, sample=idx % 2, prompt=ANSWERS[idx // 2], completion=text)
        rows.append(row | {"total_reward": value, "scores": scores} | changes)
    report_step(api.store, claim, step, segments=[write_segment(api.store, claim.uuid, rows)])


def ask(api: Running, claim: Claim, **request: Any) -> httpx.Response:
    return api.http.post(f"{JOBS}/{claim.uuid}/revisions/dry-run", json=request)


def tried(api: Running, claim: Claim, **request: Any) -> dict[str, Any]:
    answer = ask(api, claim, **request)
    assert answer.status_code == 200, answer.text
    assert len(api.store.runs.revisions(claim.uuid)) == 1, "nothing changes by it"
    return answer.json()


def test_a_new_function_is_run_on_stored_completions_with_their_rows(api: Running):
    claim = a_job(api)
    found = tried(api, claim, functions={"right": {"encodedFn": encoded(RIGHT)}}, steps=2)
    assert (found["against"], found["scoredBy"], found["firstStep"], found["lastStep"]) == (1, [1], 2, 3)
    assert (found["completions"], found["scored"], found["stopped"]) == (8, 8, None)
    length, right = found["functions"]
    assert (length["name"], length["change"], length["ran"], length["differing"]) == ("length", "same", False, 0)
    assert length["old"] == length["new"] and length["old"]["mean"] == pytest.approx(0.55)
    assert length["old"]["secondsP50"] == 0.25
    assert (right["change"], right["ran"], right["old"]) == ("added", True, None)
    assert (right["new"]["mean"], right["new"]["count"], right["new"]["failed"]) == (0.5, 8, 0)
    assert right["histogram"]["edges"][0] == 0 and right["histogram"]["edges"][-1] == 1
    assert (right["histogram"]["new"][0], right["histogram"]["new"][-1], sum(right["histogram"]["old"])) == (4, 4, 0)
    total = found["total"]
    assert (total["old"]["mean"], total["new"]["mean"]) == (pytest.approx(0.55), pytest.approx(1.05))
    assert found["diff"]["functions"][1]["change"] == "added"


def test_it_forecasts_groups_without_signal_and_what_is_pushed_the_other_way(api: Running):
    """By "length" the second answer of each group is better, by "right" the first one, which is the right one."""
    claim = a_job(api, steps=1)
    found = tried(api, claim, functions={"right": {"encodedFn": encoded(RIGHT)}})
    assert found["signal"] == {
        "groups": 2,
        "withoutSignalOld": 0,
        "withoutSignalNew": 0,
        "completions": 4,
        "flipped": 4,
    }
    assert "4 of 4 completions would be pushed the other way" in found["findings"]
    changed = [(one["row"], one["sample"], one["oldTotal"], one["newTotal"]) for one in found["changes"]]
    assert sorted(changed) == [(0, 0, 0.5, 1.5), (1, 0, 0.5, 1.5)] and all(one["flipped"] for one in found["changes"])
    first = found["changes"][0]
    assert (first["old"], first["new"]) == ({"length": 0.5}, {"length": 0.5, "right": 1.0})
    constant = RIGHT.replace("1.0 if", "0.0 if")
    found = tried(api, claim, functions={"right": {"encodedFn": encoded(constant)}}, remove=["length"])
    assert (found["signal"]["withoutSignalNew"], found["signal"]["flipped"]) == (2, 0)
    assert any("2 of 2 groups would give no signal, 2 more than now" in said for said in found["findings"])
    assert any("right gives 0 to every completion" in said for said in found["findings"])


def test_a_change_of_weights_alone_calls_nothing(api: Running):
    claim = a_job(api, steps=1)
    found = tried(api, claim, weights={"length": -1})
    (length,) = found["functions"]
    assert (length["ran"], length["change"], length["new"]["mean"]) == (False, "changed", pytest.approx(0.55))
    assert found["total"]["new"]["mean"] == pytest.approx(-0.55) and found["signal"]["flipped"] == 4
    # A schedule weighs as in the step to come, which is the second one.
    found = tried(api, claim, weights={"length": {"1": 0, "3": 4}})
    assert found["total"]["new"]["mean"] == pytest.approx(1.1)


def test_present_functions_are_run_again_when_asked(api: Running):
    claim = a_job(api, steps=1)
    found = tried(api, claim, functions={"right": {"encodedFn": encoded(RIGHT)}}, rescore=True)
    length = found["functions"][0]
    mean = sum(len(text) for text in ("4", "nine", "8", "no")) / 4 / 10
    assert length["ran"] and length["old"]["mean"] == length["new"]["mean"] == pytest.approx(mean)
    assert found["total"]["old"]["mean"] == pytest.approx(mean)


def test_failures_are_folded_with_their_traceback(api: Running):
    claim = a_job(api, steps=2)
    function = {"encodedFn": encoded(BROKEN), "on_error": "fail"}
    found = tried(api, claim, functions={"right": function})
    (failure,) = found["failures"]
    assert (failure["function"], failure["outcome"], failure["count"]) == ("right", "exception", 4)
    assert "ZeroDivisionError" in failure["error"] and "line 2" in failure["error"]
    assert failure["sample"] == 0
    assert any("right failed in 4 of 8 calls; with on_error='fail'" in said for said in found["findings"])


def test_rows_are_found_however_old(api: Running):
    claim = a_job(api, steps=1)
    for step in range(2, 5):
        commit(api, claim, step, ("4", "nine"))
    found = tried(api, claim, functions={"right": {"encodedFn": encoded(RIGHT)}}, steps=1, rows=[1, 0, 1, 7])
    assert (found["scored"], found["firstStep"], found["lastStep"], found["missingRows"]) == (4, 1, 4, [7])


def test_completions_are_counted_in_whole_steps(api: Running):
    claim = a_job(api)
    assert tried(api, claim, weights={"length": 2}, completions=5)["scored"] == 8
    assert tried(api, claim, weights={"length": 2})["scored"] == 12


def test_too_many_completions_and_too_much_time_are_said(api: Running, monkeypatch: pytest.MonkeyPatch):
    claim = a_job(api)
    monkeypatch.setattr(dry_run, "MOST_COMPLETIONS", 9)
    found = tried(api, claim, weights={"length": 2}, steps=3)
    assert found["scored"] == 8 and "9 completions at most: the newest 2 steps" in found["stopped"]
    slow = {"slow": {"encodedFn": encoded(SLOW)}}
    monkeypatch.setattr(dry_run, "SECONDS", 5.2)
    found = tried(api, claim, functions=slow, steps=1)
    assert (found["completions"], found["scored"]) == (4, 2) and "1 of 2 groups" in found["stopped"]
    monkeypatch.setattr(dry_run, "SECONDS", 0.2)
    refused = ask(api, claim, functions=slow, steps=1)
    assert refused.status_code == 400 and "not even one group" in refused.json()["error"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"functions": {"right": {"encodedFn": "ZGVmIGJhZCg6"}}}, "line 1"),
        ({"remove": ["length"]}, "nothing to try"),
        ({"weights": {"right": 1}}, "no reward function 'right'"),
    ],
)
def test_a_change_that_cannot_be_is_refused(api: Running, change: dict[str, Any], says: str):
    answer = ask(api, a_job(api, steps=1), **change)
    assert answer.status_code == 400 and says in answer.json()["error"]


def test_a_function_that_does_not_load_is_refused_with_the_reason(api: Running):
    # What only running it can tell: checks of its text find nothing wrong.
    text = "def right(prompt, completion, example, now=1 / 0):\n    return 1.0\n"
    answer = ask(api, a_job(api, steps=1), functions={"right": {"encodedFn": encoded_as_is(text)}})
    assert answer.status_code == 400 and "right" in answer.json()["error"]


def encoded_as_is(text: str) -> str:
    import base64

    return base64.b64encode(text.encode()).decode()


def test_without_completions_there_is_nothing_to_try_it_on(api: Running):
    answer = ask(api, a_job(api, steps=0), weights={"length": 2})
    assert answer.status_code == 400 and "no stored completions yet" in answer.json()["error"]


def test_a_job_that_has_ended_can_be_tried_on(api: Running):
    claim = a_job(api, steps=1)
    api.http.post(f"{JOBS}/{claim.uuid}/cancel").raise_for_status()
    assert tried(api, claim, weights={"length": 2})["scored"] == 4


def test_the_server_answers_while_a_dry_run_is_under_way(api: Running):
    claim, answers = a_job(api, steps=1), list[int]()
    request = {"functions": {"slow": {"encodedFn": encoded(SLOW)}}}

    def insist() -> None:
        while (status := ask(api, claim, **request).status_code) == 409:
            pass
        answers.append(status)

    runs = threading.Thread(target=insist)
    runs.start()
    served = 0
    refused = wait_until(
        lambda: (answer := ask(api, claim, weights={"length": 2})).status_code == 409 and answer, "it is under way"
    )
    while runs.is_alive():
        assert api.anyone.get("/health").status_code == 200
        served += 1
    runs.join()
    assert "a dry run for this job is under way" in refused.json()["error"]
    assert answers == [200] and served > 1


def test_two_at_once_on_a_server_and_one_for_a_job():
    turns = dry_run.Turns()
    with turns.turn("a"), turns.turn("b"):
        with pytest.raises(Conflict, match="for this job"), turns.turn("a"):
            pass
        with pytest.raises(Conflict, match="2 dry runs are under way"), turns.turn("c"):
            pass
    with turns.turn("c"), turns.turn("a"):
        pass
    assert LENGTH  # the function that the stored scores are of
