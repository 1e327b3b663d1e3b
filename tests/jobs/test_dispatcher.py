"""The dispatcher with real job processes (`fake_job.py`) and a real server between them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import wait_until
from server.running import Running, running

from rewardsmith import wire
from rewardsmith.jobs.dispatcher import Dispatcher
from rewardsmith.jobs.local import LocalLauncher, Ticket, log_file

FAKE_JOB = Path(__file__).with_name("fake_job.py")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "home") as server:
        server.prepare()
        yield server
        for job in server.store.runs.live():
            if job.handle:
                LocalLauncher(server.config.home).stop(job.handle, 0)


def dispatcher(api: Running, mode: str, **settings: Any) -> Dispatcher:
    launcher = LocalLauncher(api.config.home, [sys.executable, str(FAKE_JOB), mode])
    return Dispatcher(api.store, launcher, api.url, **{"lease_seconds": 60, "max_attempts": 3, **settings})


def until(here: Dispatcher, condition: Callable[[], Any], what: str) -> Any:
    """Lets the dispatcher look round until the condition holds."""

    def turn() -> Any:
        here.turn()
        return condition()

    return wait_until(turn, what, 20)


def job(api: Running, uuid: str) -> wire.Job:
    return api.store.runs.get(uuid)


def handle_of(api: Running, uuid: str) -> str:
    return next(live.handle for live in api.store.runs.live() if live.uuid == uuid and live.handle)


def process_of(api: Running, uuid: str) -> psutil.Process:
    return psutil.Process(int(handle_of(api, uuid).partition(":")[0]))


def kinds(api: Running, uuid: str) -> list[str]:
    return [event.kind for event in api.store.runs.events(uuid)]


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_queued_jobs_run_one_after_the_other(api: Running):
    here = dispatcher(api, "finish")
    first, second = api.queued_job(), api.queued_job()
    here.turn()
    assert (job(api, first).status, job(api, second).status) == ("training", "queued")
    until(here, lambda: job(api, second).status == "completed", "both jobs are done")
    assert (job(api, first).status, job(api, first).step) == ("completed", 3)
    assert "attempt with fence 1" in log_file(api.config.home, first, 1).read_text()


def test_a_job_extends_its_lease_and_is_canceled_by_request(api: Running):
    here = dispatcher(api, "hold")
    uuid = api.queued_job()
    until(here, lambda: job(api, uuid).step == 1, "the first step")
    process = process_of(api, uuid)
    before = api.store.runs.live()[0].lease_until
    until(here, lambda: api.store.runs.live()[0].lease_until > before, "a longer lease")
    assert api.http.post(f"/v2/finetuning/jobs/{uuid}/cancel").json()["status"] == "stopping"
    until(here, lambda: job(api, uuid).status == "canceled", "the job is canceled")
    until(here, lambda: gone(process), "its process is gone")
    assert job(api, uuid).attempt == 1


def test_a_job_that_does_not_hear_its_cancellation_is_killed(api: Running, monkeypatch: pytest.MonkeyPatch):
    here = dispatcher(api, "silent")
    uuid = api.queued_job()
    until(here, lambda: job(api, uuid).step == 1, "the first step")
    process = process_of(api, uuid)
    api.http.post(f"/v2/finetuning/jobs/{uuid}/cancel").raise_for_status()
    here.turn()
    assert job(api, uuid).status == "stopping" and not gone(process)
    monkeypatch.setattr("rewardsmith.jobs.dispatcher.CANCEL_GRACE_SECONDS", 0)
    here.turn()
    assert job(api, uuid).status == "canceled" and gone(process)


def test_a_killed_job_goes_back_to_the_queue_and_runs_again(api: Running):
    here = dispatcher(api, "hold")
    uuid = api.queued_job()
    until(here, lambda: job(api, uuid).step == 1, "the first step")
    process_of(api, uuid).kill()
    until(here, lambda: job(api, uuid).attempt == 2 and job(api, uuid).step == 1, "the second attempt")
    assert "restarted" in kinds(api, uuid)
    messages = " ".join(event.message for event in api.store.runs.events(uuid))
    assert "killed by SIGKILL" in messages


def test_attempts_without_progress_end_in_an_error_with_the_log(api: Running):
    here = dispatcher(api, "die", max_attempts=2)
    uuid = api.queued_job()
    until(here, lambda: job(api, uuid).status in wire.TERMINAL, "the job gives up")
    ended = job(api, uuid)
    assert (ended.status, ended.attempt) == ("errored", 2)
    assert ended.error and "exited with status 3" in ended.error
    assert "CUDA error: the device fell asleep" in ended.error
    assert str(log_file(api.config.home, uuid, 2)) in ended.error


def test_attempts_that_make_progress_do_not_count(api: Running):
    here = dispatcher(api, "step-then-die", max_attempts=2)
    uuid = api.queued_job()
    until(here, lambda: job(api, uuid).attempt == 3, "a third attempt")
    assert job(api, uuid).status != "errored"


def test_a_program_that_cannot_be_started_fails_the_attempt(api: Running):
    launcher = LocalLauncher(api.config.home, ["/no/such/program"])
    here = Dispatcher(api.store, launcher, api.url, lease_seconds=60, max_attempts=1)
    uuid = api.queued_job()
    until(here, lambda: job(api, uuid).status == "errored", "the job gives up")
    assert "cannot be started" in (job(api, uuid).error or "")


def test_a_silent_job_is_killed_some_time_after_its_lease_is_over(api: Running, monkeypatch: pytest.MonkeyPatch):
    here = dispatcher(api, "silent", max_attempts=1)
    uuid = api.queued_job()
    until(here, lambda: job(api, uuid).step == 1, "the first step")
    process = process_of(api, uuid)
    api.store.runs.extend_leases(-1)
    here.turn()
    assert job(api, uuid).status == "training" and not gone(process)
    monkeypatch.setattr("rewardsmith.jobs.dispatcher.SILENCE_GRACE_SECONDS", 0)
    until(here, lambda: job(api, uuid).status != "training", "the job is given up")
    assert gone(process)
    assert any("stopped reporting and was killed" in event.message for event in api.store.runs.events(uuid))


def test_a_job_that_was_asleep_with_its_machine_goes_on(api: Running, monkeypatch: pytest.MonkeyPatch):
    here = dispatcher(api, "hold")
    uuid = api.queued_job()
    until(here, lambda: job(api, uuid).step == 1, "the first step")
    process = process_of(api, uuid)
    process.suspend()
    api.store.runs.extend_leases(-1)
    here.turn()
    process.resume()
    until(here, lambda: not api.store.runs.live()[0].expired, "it is heard again")
    monkeypatch.setattr("rewardsmith.jobs.dispatcher.SILENCE_GRACE_SECONDS", 0)
    here.turn()
    assert (job(api, uuid).status, job(api, uuid).attempt) == ("training", 1)


def test_a_silent_job_is_left_alone_while_the_server_is_away(api: Running, monkeypatch: pytest.MonkeyPatch):
    launcher = LocalLauncher(api.config.home, [sys.executable, "-c", "import time; time.sleep(600)"])
    here = Dispatcher(api.store, launcher, "http://127.0.0.1:1", lease_seconds=60, max_attempts=1)
    uuid = api.queued_job()
    here.turn()
    monkeypatch.setattr("rewardsmith.jobs.dispatcher.SILENCE_GRACE_SECONDS", 0)
    api.store.runs.extend_leases(-1)
    here.turn()
    assert job(api, uuid).status == "training" and launcher.alive(handle_of(api, uuid))
    here.end_jobs()


def test_a_job_on_another_host_is_requeued_when_its_lease_is_over(api: Running):
    uuid = api.queued_job()
    claim = api.store.runs.claim("another-host", 60)
    assert claim
    api.store.runs.set_handle(uuid, claim.fence, f"{os.getpid()}:1.0")
    here = dispatcher(api, "hold")
    here.turn()
    assert job(api, uuid).attempt == 1
    api.store.runs.extend_leases(-1)
    until(here, lambda: job(api, uuid).attempt == 2 and job(api, uuid).step == 1, "an attempt here")


def test_a_process_that_outlives_its_job_is_killed_and_holds_the_slot_until_then(
    api: Running, monkeypatch: pytest.MonkeyPatch
):
    here = dispatcher(api, "linger")
    uuid, waiting = api.queued_job(), api.queued_job()
    here.turn()
    process = process_of(api, uuid)
    until(here, lambda: job(api, uuid).status == "completed", "the job is done")
    here.turn()
    assert not gone(process) and job(api, waiting).status == "queued"
    monkeypatch.setattr("rewardsmith.jobs.dispatcher.EXIT_GRACE_SECONDS", 0)
    until(here, lambda: job(api, waiting).status == "completed", "the next job runs")
    assert gone(process)


def test_ending_lets_jobs_save_their_state_and_leaves_no_process(api: Running, monkeypatch: pytest.MonkeyPatch):
    here = dispatcher(api, "family", slots=2)
    uuids = [api.queued_job(), api.queued_job()]
    until(here, lambda: all(job(api, uuid).step == 1 for uuid in uuids), "both jobs run")
    processes = [process_of(api, uuid) for uuid in uuids]
    wait_until(lambda: all(process.children() for process in processes), "their children", 10)
    family = processes + [child for process in processes for child in process.children()]
    here.end_jobs()
    assert [job(api, uuid).status for uuid in uuids] == ["queued", "queued"]
    assert not any("failed" in event.message for uuid in uuids for event in api.store.runs.events(uuid))
    wait_until(lambda: all(gone(process) for process in family), "nothing is left", 10)


def test_ending_kills_a_job_that_does_not_listen(api: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rewardsmith.jobs.dispatcher.STOP_GRACE_SECONDS", 0.2)
    here = dispatcher(api, "stubborn")
    uuid = api.queued_job()
    until(here, lambda: job(api, uuid).step == 1, "the first step")
    process = process_of(api, uuid)
    here.end_jobs()
    assert gone(process) and job(api, uuid).status == "queued"


DISPATCHER = """
import sys, threading
from pathlib import Path
from rewardsmith.home import ServerConfig
from rewardsmith.jobs.dispatcher import Dispatcher
from rewardsmith.jobs.local import LocalLauncher
from rewardsmith.store import Store
home, url, fake_job = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = ServerConfig(home=home)
launcher = LocalLauncher(home, [sys.executable, fake_job, "hold"])
store = Store(config.database_url, config.artifacts_url)
Dispatcher(store, launcher, url, lease_seconds=60, max_attempts=3).run(threading.Event())
"""


def test_a_new_dispatcher_takes_over_the_process_of_a_killed_one(api: Running):
    uuid = api.queued_job()
    arguments = [sys.executable, "-c", DISPATCHER, str(api.config.home), api.url, str(FAKE_JOB)]
    with subprocess.Popen(arguments) as first:
        wait_until(lambda: job(api, uuid).step == 1, "the job runs", 20)
        handle, process = handle_of(api, uuid), process_of(api, uuid)
        first.send_signal(signal.SIGKILL)
    here = dispatcher(api, "hold")
    here.turn()
    assert not gone(process)
    assert (handle_of(api, uuid), job(api, uuid).attempt) == (handle, 1)
    api.queued_job()
    here.turn()
    assert [live.uuid for live in api.store.runs.live()] == [uuid], "the adopted job holds its slot"
    api.http.post(f"/v2/finetuning/jobs/{uuid}/cancel").raise_for_status()
    until(here, lambda: job(api, uuid).status == "canceled" and gone(process), "the adopted job ends")


def test_a_process_whose_handle_was_not_stored_is_taken_over(api: Running):
    uuid = api.queued_job()
    here = dispatcher(api, "hold")
    claim = api.store.runs.claim(socket.gethostname(), 60)
    assert claim
    launcher = LocalLauncher(api.config.home, [sys.executable, str(FAKE_JOB), "hold"])
    handle = launcher.start(Ticket(api.url, uuid, claim.fence, claim.attempt, claim.token))
    until(here, lambda: job(api, uuid).step == 1, "the job runs")
    assert handle_of(api, uuid) == handle
    here.end_jobs()
    assert not launcher.alive(handle) and job(api, uuid).status == "queued"


def test_an_adopted_process_that_dies_is_noticed(api: Running):
    uuid = api.queued_job()
    until(dispatcher(api, "hold"), lambda: job(api, uuid).step == 1, "the first step")
    here = dispatcher(api, "hold")
    here.turn()
    process_of(api, uuid).kill()
    until(here, lambda: job(api, uuid).attempt == 2, "the second attempt")
