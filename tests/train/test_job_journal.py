"""The job's side of the journal, against a real server that answers 503, drops connections and hands the job away."""

import threading
import time
from collections.abc import Callable

import pytest
from job_runs import LENGTH, UUID, config, revision, spec
from scripted_server import TOKEN, ScriptedServer

from rewardsmith.errors import JobCanceled, JobError, LeaseLost, ServerLost
from rewardsmith.train import journal as journal_module
from rewardsmith.train.journal import Journal
from rewardsmith.wire import Control, Finish, StepReport


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "LONGEST_PAUSE_SECONDS", 0.1)


def connect(server: ScriptedServer, **settings) -> Journal:
    return Journal(server.url, UUID, 1, TOKEN, **{"heartbeat_seconds": 60, "patience": 5} | settings)


def step(number: int) -> StepReport:
    return StepReport(
        fence=1, step=number, epoch=0.5, total_steps=9, steps_per_epoch=2, revision=1, metrics={"total_reward": 0.5}
    )


def steps(server: ScriptedServer) -> list[int]:
    return [body["step"] for body in server.bodies("report")]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_report_arrives_and_its_answer_is_the_control():
    with ScriptedServer() as server, connect(server) as journal:
        server.control = Control(action="stop", revision=4)
        assert journal.send(step(1)) == Control(action="stop", revision=4) == journal.control
        assert server.bodies("report")[0]["totalSteps"] == 9
        assert journal.caught_up


def test_spec_and_revisions_are_fetched_through_bad_answers(tmp_path):
    job = spec(tmp_path, tmp_path, config())
    other = revision(2, length=LENGTH)
    with ScriptedServer(job, {2: other}) as server, connect(server) as journal:
        server.faults.extend([503, "refuse", 429])
        assert journal.spec() == job
        assert journal.revision(2) == other


def test_reports_wait_in_order_while_the_server_is_away_and_the_job_goes_on():
    with ScriptedServer() as server, connect(server) as journal:
        server.faults.extend([503, "refuse", 500])
        for number in (1, 2, 3):
            journal.send(step(number))  # one try each, none gets through, none blocks
        assert not server.received and not journal.caught_up
        journal.send(step(4))
        assert steps(server) == [1, 2, 3, 4]


def test_a_full_backlog_waits_for_the_server():
    with ScriptedServer() as server, connect(server, backlog=2) as journal:
        server.faults.extend([503] * 9)
        journal.send(step(1))
        journal.send(step(2))
        assert len(server.faults) == 7 and not server.received
        journal.send(step(3))  # has to wait until one of the three has gone
        assert steps(server) == [1, 2, 3]
        assert journal.waited_seconds > 0


def test_a_report_whose_answer_was_lost_is_sent_again():
    with ScriptedServer() as server, connect(server) as journal:
        server.faults.append("drop")
        journal.send(step(1), wait=True)
        assert steps(server) == [1, 1]  # the server keeps one: a report is idempotent on its step


@pytest.mark.parametrize("status", [409, 401, 403, 404])
def test_another_owner_ends_the_job_at_once(status: int):
    with ScriptedServer() as server, connect(server) as journal:
        server.faults.append(status)
        with pytest.raises(LeaseLost, match=str(status)):
            journal.send(step(1))
        for call in (journal.check, lambda: journal.send(step(2)), lambda: journal.control):
            with pytest.raises(LeaseLost):
                call()
        with pytest.raises(LeaseLost):
            journal.finish(Finish(fence=1, status="completed"))
        assert not server.received


def test_the_heartbeat_notices_that_the_lease_is_lost():
    with ScriptedServer() as server, connect(server, heartbeat_seconds=0.02) as journal:
        until(lambda: len(server.bodies("heartbeat")) > 2)
        journal.check()
        server._answer = lambda *_: (409, "{}")
        with pytest.raises(LeaseLost):
            until(lambda: journal.check() is not None)


def test_the_heartbeat_brings_a_cancel_between_reports():
    with ScriptedServer() as server, connect(server, heartbeat_seconds=0.02) as journal:
        server.control = Control(action="cancel")
        with pytest.raises(JobCanceled):
            until(lambda: journal.check() is not None)
        journal.finish(Finish(fence=1, status="canceled"))  # still possible
        assert server.bodies("finish")


def test_a_refused_report_is_the_jobs_error_and_does_not_block_the_end():
    with ScriptedServer() as server, connect(server) as journal:
        server.faults.append(400)
        with pytest.raises(JobError, match="refused the job's report: 400"):
            journal.send(step(1))
        journal.finish(Finish(fence=1, status="errored", error="because"))
        assert server.bodies("finish")[0]["error"] == "because"


def test_patience_ends():
    with ScriptedServer() as server, connect(server, patience=0.5, backlog=1) as journal:
        server.faults.extend([503] * 10_000)
        journal.send(step(1))
        with pytest.raises(ServerLost, match="has not answered"):
            journal.send(step(2))
        with pytest.raises(ServerLost):
            journal.check()


def test_a_server_that_is_not_there_at_all():
    with ScriptedServer() as server:
        pass
    with connect(server, patience=0.5) as journal, pytest.raises(ServerLost):
        journal.spec()


def test_heartbeats_count_as_answers():
    with ScriptedServer() as server, connect(server, heartbeat_seconds=0.05, patience=0.4) as journal:
        until(lambda: len(server.bodies("heartbeat")) > 20)
        journal.check()


def test_flush_tries_for_a_while_and_says_whether_it_worked():
    with ScriptedServer() as server, connect(server) as journal:
        server.faults.extend([503, 503, 503])
        journal.send(step(1))
        assert journal.flush(seconds=20) and steps(server) == [1]
        server.faults.extend([503] * 1000)
        journal.send(step(2))
        assert not journal.flush(seconds=0.3)


def test_a_report_waits_for_its_turn_behind_a_slow_heartbeat():
    """The answer to a heartbeat sent before a report must not replace the report's own, newer one."""
    with ScriptedServer() as server, connect(server) as journal:
        asked, answer = threading.Event(), threading.Event()

        def slow(path: str, body: dict) -> None:
            if path == "heartbeat":
                asked.set()
                assert answer.wait(20)

        server.on_report = slow
        beating = threading.Thread(target=journal.beat)
        beating.start()
        assert asked.wait(20)
        sender = threading.Thread(target=lambda: journal.event("paused", "why", wait=True))
        sender.start()
        assert not server.bodies("event")
        server.on_report = lambda path, body: setattr(server, "control", Control(paused=path == "event"))
        answer.set()
        beating.join(20)
        sender.join(20)
        assert journal.control.paused


def test_an_end_that_is_refused_for_its_checkpoint_is_told_without_it():
    with ScriptedServer() as server, connect(server) as journal:
        server.faults.append(400)
        journal.finish(Finish(fence=1, status="errored", error="disk full", checkpoint=3))
        assert server.bodies("finish") == [{"fence": 1, "status": "errored", "error": "disk full", "checkpoint": None}]


def test_a_run_that_cannot_serve_its_checkpoint_is_not_completed():
    with ScriptedServer() as server, connect(server) as journal:
        server.faults.append(400)
        journal.finish(Finish(fence=1, status="completed", checkpoint=3))
        (body,) = server.bodies("finish")
        assert (body["status"], body["checkpoint"]) == ("errored", None)
        assert "refused the job's finish: 400" in body["error"]


def test_a_refused_report_before_the_end_does_not_keep_it_back():
    with ScriptedServer() as server, connect(server) as journal:
        server.faults.extend([503, 503])
        journal.send(step(1))
        journal.send(step(2))
        server.faults.extend([400, 400])
        journal.finish(Finish(fence=1, status="completed", checkpoint=3))
        (body,) = server.bodies("finish")
        assert (body["status"], body["checkpoint"]) == ("errored", 3)
        assert "refused the job's report: 400" in body["error"]


def test_an_end_that_is_refused_again_is_an_error():
    with ScriptedServer() as server, connect(server) as journal:
        server.faults.extend([400, 400])
        with pytest.raises(JobError, match="refused the job's finish"):
            journal.finish(Finish(fence=1, status="canceled", checkpoint=3))


def test_until_the_server_answers_the_specs_revision_is_the_one_to_run(tmp_path):
    job = spec(tmp_path, tmp_path, config(), first=revision(4, length=LENGTH))
    with ScriptedServer(job) as server, connect(server) as journal:
        journal.spec()
        assert journal.control == Control(revision=4)
        server.control = Control(action="stop")
        journal.beat()
        journal.spec()
        assert journal.control == Control(action="stop")
