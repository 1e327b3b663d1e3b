"""Reward functions in whole job attempts: a new revision, one that fails, values that are none."""

import threading
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from job_runs import (
    LENGTH,
    LETTER_A,
    LONG,
    at_step,
    config,
    events,
    finish,
    function,
    revision,
    run,
    segment_rows,
    series,
    spec,
)
from scripted_server import ScriptedServer

from rewardsmith.jobs.entry import YIELDED
from rewardsmith.train.evaluate import PATIENCE
from rewardsmith.wire import Control, ResumePoint


def test_a_new_revision_scores_whole_steps_from_the_next_on(model: Path, folder: Path):
    change = revision(2, letter_a=LETTER_A, length=LENGTH)
    with ScriptedServer(spec(folder, model, config(train_steps=5)), {2: change}) as server:
        server.on_report = at_step(2, lambda: setattr(server, "control", Control(revision=2)))
        assert run(server) == 0
    assert [(b["step"], b["revision"]) for b in server.bodies("report")] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 2),
    ]
    assert sorted(series(server, "reward/length/mean")) == [3, 4, 5]
    (event,) = [body for body in server.bodies("event") if body["kind"] == "revision"]
    assert (event["revision"], event["step"], event["refused"]) == (2, 3, None)
    for row in segment_rows(folder, server, "completions"):
        assert row["revision"] == (1 if row["step"] < 3 else 2)
        assert [name for name, _ in row["scores"]] == (["letter_a"] if row["step"] < 3 else ["letter_a", "length"])


def test_a_broken_revision_changes_nothing(model: Path, folder: Path):
    broken = revision(2, letter_a="def letter_a(prompt, completion, example):\n    return undefined_name\n")
    with ScriptedServer(spec(folder, model, config()), {2: broken}) as server:
        server.on_report = at_step(1, lambda: setattr(server, "control", Control(revision=2)))
        assert run(server) == 0
    (event,) = [body for body in server.bodies("event") if body["kind"] == "revision"]
    assert event["revision"] == 2 and "letter_a" in event["refused"] and "undefined_name" in event["refused"]
    assert {body["revision"] for body in server.bodies("report")} == {1}
    assert finish(server)["status"] == "completed"


def test_an_accepted_revision_is_taken_up_when_a_later_one_is_refused(model: Path, folder: Path):
    broken = revision(3, letter_a="def letter_a(prompt, completion, example):\n    return undefined_name\n")
    with ScriptedServer(
        spec(folder, model, config(train_steps=5)), {2: revision(2, length=LENGTH), 3: broken}
    ) as server:

        def on_report(path: str, body: dict[str, Any]) -> None:
            if path == "report" and body["step"] == 1:
                server.control = Control(revision=3)  # 2 and 3 came while the step ran
            if path == "event" and body["refused"]:
                server.control = Control(revision=2)

        server.on_report = on_report
        assert run(server) == 0
    assert [(b["revision"], b["refused"] is None) for b in server.bodies("event") if b["kind"] == "revision"] == [
        (3, False),
        (2, True),
    ]
    revisions = {body["step"]: body["revision"] for body in server.bodies("report")}
    assert revisions[1] == 1 and revisions[4] == revisions[5] == 2


def test_a_resumed_job_keeps_its_revision_while_the_server_is_silent(model: Path, folder: Path):
    """Without an answer there is no control; the first revision, which a Control has by default, is not one."""
    job = spec(folder, model, config(train_steps=2), first=revision(2, length=LENGTH), fence=2)
    with ScriptedServer(job, {1: revision(letter_a=LETTER_A), 2: job.revision}) as server:
        answer = server._answer
        unheard = deque(["the first heartbeat", "the base's report", "and again after step 1"])

        def late(path: str, body: dict[str, Any] | None, authorization: str) -> tuple[int | None, str]:
            if not unheard or path in ("spec", "revisions/1"):
                return answer(path, body, authorization)
            return 503, unheard.popleft()

        server._answer = late
        server.control = Control(revision=2)
        assert run(server) == 0
    assert {body["revision"] for body in server.bodies("report")} == {2}


def test_a_change_of_rewards_starts_the_held_out_comparison_anew(model: Path, folder: Path):
    """Totals above 10 by the first revision, below 1 by the second, which is not worse for that."""
    high = revision(letter_a=LETTER_A.replace("/ 8", "/ 8 + 10"))
    job = config(train_steps=16, enable_early_stopping=True)
    with ScriptedServer(spec(folder, model, job, first=high), {2: revision(2, letter_a=LETTER_A)}) as server:
        server.on_report = at_step(2, lambda: setattr(server, "control", Control(revision=2)))
        assert run(server) == 0
    saved = server.bodies("checkpoint")
    assert saved[0]["evalReward"] > 10 > 1 >= max(body["evalReward"] for body in saved[1:])
    assert [body["best"] for body in saved[:2]] == [True, True]
    assert finish(server)["checkpoint"] == max(saved[1:], key=lambda body: body["evalReward"])["checkpoint"]
    assert saved[-1]["step"] == 16 or server.bodies("report")[-1]["step"] >= 2 + 2 * (PATIENCE + 1)


def test_after_a_change_the_newest_checkpoint_is_served_until_one_is_evaluated(model: Path, folder: Path):
    high = revision(letter_a=LETTER_A.replace("/ 8", "/ 8 + 10"))
    with ScriptedServer(
        spec(folder, model, config(train_steps=LONG), first=high), {2: revision(2, a=LETTER_A)}
    ) as server:

        def on_report(path: str, body: dict[str, Any]) -> None:
            if path == "report" and body["step"] in (2, 3):
                server.control = Control(revision=2, action="stop" if body["step"] == 3 else "continue")

        server.on_report = on_report
        assert run(server) == 0
    assert [(b["checkpoint"], b["step"], b["best"]) for b in server.bodies("checkpoint")] == [
        (1, 2, True),
        (2, 3, False),
    ]
    assert (finish(server)["status"], finish(server)["checkpoint"]) == ("stopped", 2)


def test_a_resumed_job_does_not_compare_with_what_an_older_revision_scored(model: Path, folder: Path):
    yielding = threading.Event()
    high = revision(letter_a=LETTER_A.replace("/ 8", "/ 8 + 10"))
    with ScriptedServer(spec(folder, model, config(), first=high)) as first:
        first.on_report = at_step(2, yielding.set)
        assert run(first, yielding) == YIELDED
    (last,) = first.bodies("checkpoint")
    resume = ResumePoint(step=2, checkpoint=1, state_path=last["statePath"])
    new = revision(2, letter_a=LETTER_A)
    with ScriptedServer(spec(folder, model, config(), fence=2, resume=resume, first=new)) as second:
        second.control = Control(revision=2)
        assert run(second) == 0
    (saved,) = second.bodies("checkpoint")
    assert saved["best"] and finish(second)["checkpoint"] == 2


@pytest.mark.parametrize("value", ["1.5e308 if len(completion) % 2 else -1.5e308", "1e200 if completion else 0.0"])
def test_rewards_too_large_to_compare_are_no_numbers_and_harm_nothing(value: str, model: Path, folder: Path):
    huge = f"def huge(prompt, completion, example):\n    return {value}\n"
    with ScriptedServer(spec(folder, model, config(train_steps=1), first=revision(huge=huge))) as server:
        assert run(server) == 0
    assert finish(server)["status"] == "completed"
    assert series(server, "reward/huge/error_rate")[1] > 0 and series(server, "grad_norm")[1] == 0
    logs = segment_rows(folder, server, "reward_logs")
    assert all(row["outcome"] == "not_a_number" and "too large to compare" in row["error"] for row in logs)


FAILING = "def failing(prompt, completion, example):\n    raise ValueError('no such thing')\n"


def test_failing_rewards_pause_the_job_until_a_new_revision(model: Path, folder: Path):
    first = revision(failing=FAILING)
    with ScriptedServer(spec(folder, model, config(), first=first), {2: revision(2, letter_a=LETTER_A)}) as server:

        def on_report(path: str, body: dict[str, Any]) -> None:
            if path == "event" and body["kind"] == "paused":
                server.control = Control(paused=True)
            if path == "heartbeat" and server.control.paused and len(server.bodies("report")) == 3:
                server.control = Control(revision=2)

        server.on_report = on_report
        assert run(server) == 0
    (reason,) = events(server, "paused")
    assert "failing" in reason and "no such thing" in reason
    assert [body["revision"] for body in server.bodies("report")] == [1, 1, 1, 2, 2]
    assert series(server, "reward/failing/error_rate")[2] == 1 and series(server, "total_reward")[2] == 0
    logs = [row for row in segment_rows(folder, server, "reward_logs") if row["revision"] == 1]
    assert len(logs) == 2 * 8
    assert all(row["outcome"] == "exception" and "no such thing" in row["error"] for row in logs)


def test_a_job_that_is_resumed_without_a_change_gets_a_new_chance(model: Path, folder: Path):
    with ScriptedServer(spec(folder, model, config(train_steps=5), first=revision(failing=FAILING))) as server:

        def on_report(path: str, body: dict[str, Any]) -> None:
            if path == "event" and body["kind"] == "paused":
                server.control = Control(paused=True)
            if path == "heartbeat":
                server.control = Control()

        server.on_report = on_report
        assert run(server) == 0
    assert [body["step"] for body in server.bodies("event") if body["kind"] == "paused"] == [2, 4]


def test_on_error_fail_ends_the_job_naming_function_and_error(model: Path, folder: Path):
    first = revision().model_copy(update={"functions": [function("failing", FAILING, on_error="fail")]})
    with ScriptedServer(spec(folder, model, config(), first=first)) as server:
        assert run(server) == 0
    assert finish(server)["status"] == "errored" and finish(server)["checkpoint"] is None
    assert "failing" in finish(server)["error"] and "no such thing" in finish(server)["error"]


def test_excluded_completions_have_no_total_and_no_advantage(model: Path, folder: Path):
    picky = "def picky(prompt, completion, example):\n    return 1 / completion.count('a')\n"
    first = revision().model_copy(
        update={"functions": [function("picky", picky, on_error="exclude"), function("letter_a", LETTER_A)]}
    )
    # The guard would stop a function that fails this often; it sees less than 200 calls here.
    with ScriptedServer(spec(folder, model, config(train_steps=2), first=first)) as server:
        assert run(server) == 0
    train = segment_rows(folder, server, "completions")
    excluded = [row for row in train if "a" not in row["completion"]]
    assert excluded and len(excluded) < len(train)
    assert all((row["total_reward"], row["advantage"]) == (None, 0) for row in excluded)
    assert all(row["total_reward"] is not None for row in train if "a" in row["completion"])


def test_a_run_that_cannot_learn_says_so_once(model: Path, folder: Path):
    same = revision(1, same="def same(prompt, completion, example):\n    return 1.0\n")
    with ScriptedServer(spec(folder, model, config(train_steps=13), first=same)) as server:
        assert run(server) == 0
    said = [b for b in server.bodies("event") if "nothing was learned" in b["message"]]
    assert [(b["kind"], b["step"]) for b in said] == [("warning", 10)]
    assert series(server, "group/frac_zero_signal")[13] == 1.0
