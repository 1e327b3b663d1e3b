"""What revisions do in whole job attempts: weights by step, and the old functions scored on beside the new ones."""

import threading
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from job_runs import (
    LENGTH,
    LETTER_A,
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
from rewardsmith.rewards.pool import RewardPool
from rewardsmith.train import comparison, reward_pools
from rewardsmith.wire import Control, JobSpec, ResumePoint, Revision, RevisionFunction

HALF_A = LETTER_A.replace("/ 8", "/ 16")


def made_of(number: int, *functions: RevisionFunction, **fields: Any) -> Revision:
    return revision(number).model_copy(update={"functions": [*functions], **fields})


def change_at(server: ScriptedServer, step: int, number: int) -> None:
    server.on_report = at_step(step, lambda: setattr(server, "control", Control(revision=number)))


def by_step(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    steps: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).append(row)
    return steps


# ---- weights


def test_a_schedule_weighs_each_step_and_is_in_its_metrics(model: Path, folder: Path):
    first = made_of(
        1, function("letter_a", LETTER_A, schedule={2: 1.0, 4: 3.0}), function("length", LENGTH, weight=0.5)
    )
    with ScriptedServer(spec(folder, model, config(train_steps=5), first=first)) as server:
        assert run(server) == 0
    assert series(server, "reward/letter_a/weight") == {1: 1.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 3.0}
    assert series(server, "reward/length/weight") == {}, "one number, which the revision has"
    for row in segment_rows(folder, server, "completions"):
        values = {name: score["value"] for name, score in row["scores"]}
        weight = {1: 1.0, 2: 1.0, 3: 2.0}.get(row["step"], 3.0)
        assert row["total_reward"] == pytest.approx(weight * values["letter_a"] + 0.5 * values["length"])


def test_held_out_rows_are_weighed_as_at_the_end_so_that_evaluations_can_be_compared(model: Path, folder: Path):
    first = made_of(1, function("letter_a", LETTER_A, schedule={1: 0.0, 4: 2.0}))
    with ScriptedServer(spec(folder, model, config(), first=first)) as server:
        assert run(server) == 0
    rows = segment_rows(folder, server, "completions", "eval")
    assert {row["step"] for row in rows} == {0, 2, 4}
    assert all(row["total_reward"] == 2.0 * dict(row["scores"])["letter_a"]["value"] for row in rows)


def test_a_change_of_weight_is_a_revision_and_starts_no_processes(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    started = []

    class Counted(RewardPool):
        def start(self) -> None:
            started.append([function.name for function in self.functions])
            super().start()

    monkeypatch.setattr(reward_pools, "RewardPool", Counted)
    second = made_of(2, function("letter_a", LETTER_A, weight=-1.0))
    third = made_of(3, function("letter_a", LETTER_A, on_error="exclude"))
    with ScriptedServer(spec(folder, model, config(train_steps=6)), {2: second, 3: third}) as server:

        def on_report(path: str, body: dict[str, Any]) -> None:
            if path == "report" and body["step"] in (2, 4):
                server.control = Control(revision=2 if body["step"] == 2 else 3)

        server.on_report = on_report
        assert run(server) == 0
    taken_up = [(b["revision"], b["step"]) for b in server.bodies("event") if b["kind"] == "revision"]
    assert taken_up == [(2, 3), (3, 5)]
    assert started == [["letter_a"]] * 2, "at the beginning and for the third one"
    for step, rows in by_step(segment_rows(folder, server, "completions")).items():
        weight = -1 if step in (3, 4) else 1
        assert {row["revision"] for row in rows} == {1 + (step > 2) + (step > 4)}
        assert [row["total_reward"] for row in rows] == [weight * row["scores"][0][1]["value"] for row in rows]


# ---- the old functions beside the new ones


def test_what_a_revision_changed_is_scored_on_for_some_steps(model: Path, folder: Path):
    first = made_of(1, function("letter_a", LETTER_A, weight=2.0), function("length", LENGTH))
    second = made_of(2, function("letter_a", HALF_A), function("length", LENGTH), compared_steps=2)
    with ScriptedServer(spec(folder, model, config(train_steps=6), first=first), {2: second}) as server:
        change_at(server, 2, 2)
        assert run(server) == 0
    old, new = series(server, "reward/letter_a@1/mean"), series(server, "reward/letter_a/mean")
    assert sorted(old) == [3, 4], "the steps that the revision says"
    assert all(value == pytest.approx(2 * new[step]) for step, value in old.items())
    assert series(server, "reward/length@1/mean") == {}, "it has not changed: its own curve goes on"
    totals = series(server, "total_reward@1")
    for step, rows in by_step(segment_rows(folder, server, "completions")).items():
        assert [name for name, _ in rows[0]["scores"]] == ["letter_a", "length"]
        if step in totals:
            scores = [dict(row["scores"]) for row in rows]
            expected = fmean(2 * 2 * s["letter_a"]["value"] + s["length"]["value"] for s in scores)
            assert totals[step] == pytest.approx(expected)
    assert sorted(totals) == [3, 4] == sorted(series(server, "seconds/compare"))
    assert not [text for text in events(server, "info") if "for comparison" in text]


def test_a_function_that_was_taken_out_is_scored_on(model: Path, folder: Path):
    first = made_of(1, function("letter_a", LETTER_A), function("length", LENGTH))
    second = made_of(2, function("letter_a", LETTER_A), compared_steps=9)
    with ScriptedServer(spec(folder, model, config(), first=first), {2: second}) as server:
        change_at(server, 1, 2)
        assert run(server) == 0
    assert sorted(series(server, "reward/length@1/mean")) == [2, 3, 4]
    assert sorted(series(server, "reward/length/mean")) == [1]


def test_without_being_asked_nothing_is_scored_on(model: Path, folder: Path):
    with ScriptedServer(spec(folder, model, config()), {2: revision(2, length=LENGTH)}) as server:
        change_at(server, 1, 2)
        assert run(server) == 0
    assert not [name for body in server.bodies("report") for name in body["metrics"] if "@" in name]


def taken_up_after(old: Revision, folder: Path, model: Path) -> JobSpec:
    """A job that begins with revision 3, which took the place of an `old` one that this attempt never trained with."""
    new = made_of(3, function("letter_a", LETTER_A), compared_steps=99, effective_step=1, replaces=old.revision)
    return spec(folder, model, config(train_steps=5), first=new)


FAILING = "def letter_a(prompt, completion, example):\n    raise ValueError('old and bad')\n"


def test_an_old_function_that_fails_pauses_and_ends_nothing(model: Path, folder: Path):
    second = made_of(2, function("letter_a", FAILING, on_error="fail"))
    with ScriptedServer(taken_up_after(second, folder, model), {2: second}) as server:
        server.control = Control(revision=3)
        assert run(server) == 0
    assert finish(server)["status"] == "completed" and events(server, "paused") == []
    assert set(series(server, "reward/letter_a@2/mean").values()) == {0.0}


def test_a_job_that_restarts_goes_on_comparing(model: Path, folder: Path):
    yielding = threading.Event()
    first, second = revision(1, letter_a=LETTER_A), made_of(2, function("letter_a", HALF_A), compared_steps=3)
    with ScriptedServer(spec(folder, model, config(train_steps=8), first=first), {2: second}) as server:

        def on_report(path: str, body: dict[str, Any]) -> None:
            if path == "report" and body["step"] == 1:
                server.control = Control(revision=2)
            if path == "report" and body["step"] == 2:
                yielding.set()

        server.on_report = on_report
        assert run(server, yielding) == YIELDED
    (saved,) = server.bodies("checkpoint")
    resume = ResumePoint(step=2, checkpoint=1, state_path=saved["statePath"])
    resumed = second.model_copy(update={"effective_step": 2, "replaces": 1})
    again = spec(folder, model, config(train_steps=8), fence=2, resume=resume, first=resumed)
    with ScriptedServer(again, {1: first, 2: resumed}) as server:
        server.control = Control(revision=2)
        assert run(server) == 0
    assert sorted(series(server, "reward/letter_a@1/mean")) == [3, 4]


def test_old_functions_that_are_too_slow_are_let_go_and_hold_up_nothing(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(comparison, "CLOSING_SECONDS", 0.01)
    slow = "def letter_a(prompt, completion, example):\n    import time\n    time.sleep(2)\n    return 1.0\n"
    second = revision(2, letter_a=slow)
    with ScriptedServer(taken_up_after(second, folder, model), {2: second}) as server:
        server.control = Control(revision=3)
        assert run(server) == 0
    assert finish(server)["status"] == "completed" and len(series(server, "total_reward")) == 5
    assert series(server, "reward/letter_a@2/mean") == {} == series(server, "total_reward@2")
    said = [text for text in events(server, "info") if "no longer scored for comparison" in text]
    assert said == ["revision 2 is no longer scored for comparison: its functions took longer than 3 steps running"]


def test_an_old_function_that_does_not_load_any_more_is_said_once(model: Path, folder: Path):
    broken = "def letter_a(prompt, completion, example, now=1 / 0):\n    return 1.0\n"
    second = revision(2, letter_a=broken)
    with ScriptedServer(taken_up_after(second, folder, model), {2: second}) as server:
        server.control = Control(revision=3)
        assert run(server) == 0
    assert finish(server)["status"] == "completed"
    (said,) = [text for text in events(server, "info") if "cannot be scored for comparison" in text]
    assert "revision 2" in said and "letter_a" in said
