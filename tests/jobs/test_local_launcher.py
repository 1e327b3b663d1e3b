"""Job processes on this machine: the ticket, the environment, recognition, and an end that leaves nothing."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from processes import wait_until

from rewardsmith.jobs.local import LocalLauncher, Ticket, log_file, tail

TICKET = Ticket(url="http://127.0.0.1:1", uuid="job-1", fence=3, attempt=2, token="the-secret")


def launcher(home: Path, program: str) -> LocalLauncher:
    return LocalLauncher(home, [sys.executable, "-c", program])


def words(home: Path) -> str:
    return tail(log_file(home, "job-1", 2))


def pid_of(handle: str) -> int:
    return int(handle.partition(":")[0])


def ended(here: LocalLauncher, handle: str) -> int | None:
    wait_until(lambda: not here.alive(handle), "the process ends", 10)
    return here.exit_code(handle)


def test_the_ticket_comes_by_stdin_and_the_secret_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REWARDSMITH_API_TOKEN", "of-the-server")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-server")
    monkeypatch.setenv("HF_HOME", "/models")
    program = (
        "import json, os, sys\n"
        "print(json.dumps([json.loads(sys.stdin.readline()), sys.stdin.read(), dict(os.environ), sys.argv, os.getcwd(),"
        " os.getsid(0) == os.getpid()]))"
    )
    here = launcher(tmp_path, program)
    assert ended(here, here.start(TICKET)) == 0
    ticket, rest, environment, arguments, folder, leads_session = json.loads(words(tmp_path))
    assert ticket == {"url": "http://127.0.0.1:1", "uuid": "job-1", "fence": 3, "token": "the-secret"}
    assert (rest, arguments, folder, leads_session) == ("", ["-c"], str(tmp_path), True)
    assert "of-the-server" not in environment.values() and "the-secret" not in environment.values()
    assert environment["HF_HOME"] == "/models"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE" and int(environment["OMP_NUM_THREADS"]) >= 1
    assert "the-secret" not in repr(TICKET)


def test_a_program_that_never_reads_its_ticket_is_no_error(tmp_path: Path):
    here = launcher(tmp_path, "import os; os._exit(4)")
    assert ended(here, here.start(TICKET)) == 4


def test_a_process_is_recognised_by_another_launcher_and_an_impostor_is_not(tmp_path: Path):
    here = launcher(tmp_path, "import time; time.sleep(600)")
    handle = here.start(TICKET)
    successor = LocalLauncher(tmp_path)
    assert here.alive(handle) and successor.alive(handle)
    pid, started, _ = handle.split(":", 2)
    reused = f"{pid}:{float(started) - 3600}:another-job:1"
    assert not successor.alive(reused)
    successor.stop(reused, 0)
    assert here.alive(handle), "a process that only has the same pid was killed"
    successor.stop(handle, 5)
    assert not here.alive(handle) and not successor.alive(handle)
    assert (here.exit_code(handle), successor.exit_code(handle)) == (-signal.SIGTERM, None)


def test_stop_waits_for_one_that_saves_its_state(tmp_path: Path):
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75)))\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.05)"
    )
    here = launcher(tmp_path, program)
    handle = here.start(TICKET)
    wait_until(lambda: "ready" in words(tmp_path), "it is ready", 10)
    here.stop(handle, 10)
    assert here.exit_code(handle) == 75
    assert words(tmp_path).splitlines() == ["ready", "saved"]


def test_stop_kills_one_that_does_not_listen_with_all_it_started(tmp_path: Path):
    program = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    here = launcher(tmp_path, program)
    handle = here.start(TICKET)
    child = int(wait_until(lambda: words(tmp_path).strip(), "the child is there", 10))
    here.stop(handle, 0.1)
    assert here.exit_code(handle) == -signal.SIGKILL
    wait_until(lambda: gone(child), "the child is gone", 10)


def test_stop_clears_up_after_one_that_was_killed_itself(tmp_path: Path):
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    here = launcher(tmp_path, program)
    handle = here.start(TICKET)
    child = int(wait_until(lambda: words(tmp_path).strip(), "the child is there", 10))
    os.kill(pid_of(handle), signal.SIGKILL)
    assert ended(here, handle) == -signal.SIGKILL
    assert not gone(child)
    here.stop(handle, 0)
    wait_until(lambda: gone(child), "the child is gone", 10)


def test_what_an_adopted_process_left_behind_is_cleared_up_while_its_status_is_unread(tmp_path: Path):
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    first = launcher(tmp_path, program)
    handle = first.start(TICKET)
    child = int(wait_until(lambda: words(tmp_path).strip(), "the child is there", 10))
    os.kill(pid_of(handle), signal.SIGKILL)
    successor = LocalLauncher(tmp_path)
    wait_until(lambda: not successor.alive(handle), "it is a zombie", 10)
    assert psutil.Process(pid_of(handle)).status() == psutil.STATUS_ZOMBIE
    successor.stop(handle, 0)
    wait_until(lambda: gone(child), "the child is gone", 10)
    assert first.exit_code(handle) == -signal.SIGKILL


REWARDS = """
import sys
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.rewards.sandbox.tiers import Tier
from rewardsmith.wire import RevisionFunction
source = '''def slow(prompt, completion, example):
    import subprocess, time
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(example["file"], "w") as file:
        print(child.pid, file=file)
    time.sleep(600)
'''
if __name__ == "__main__":
    with RewardPool([RevisionFunction(name="slow", source=source, source_sha256="")], workers=1, tier=Tier.S0) as pool:
        pool.score([Group("prompt", {"file": sys.argv[1]}, ["completion"])])
"""


def test_what_reward_functions_started_ends_when_the_job_is_killed(tmp_path: Path):
    file = tmp_path / "pid"
    here = LocalLauncher(tmp_path, [sys.executable, "-c", REWARDS, str(file)])
    handle = here.start(TICKET)
    child = int(wait_until(lambda: file.exists() and file.read_text().strip(), "the function runs", 30))
    os.kill(pid_of(handle), signal.SIGKILL)
    assert ended(here, handle) == -signal.SIGKILL
    wait_until(lambda: gone(child), "its sandbox ends with the job, and all that was started in it", 10)
    other = launcher(tmp_path, "import time; time.sleep(600)")
    sibling = other.start(replace(TICKET, attempt=3))
    here.stop(handle, 0)
    assert other.alive(sibling), "a process of another attempt was killed"
    other.stop(sibling, 0)


def test_a_process_is_found_whose_handle_was_not_stored(tmp_path: Path):
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    here = launcher(tmp_path, program)
    handle = here.start(TICKET)
    wait_until(lambda: words(tmp_path).strip(), "the child is there", 10)
    successor = LocalLauncher(tmp_path)
    assert successor.find("job-1", 2) == handle
    assert successor.find("job-1", 1) is None
    successor.stop(handle, 0)
    assert successor.find("job-1", 2) is None


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_last_words_name_the_log_and_its_end(tmp_path: Path):
    here = launcher(tmp_path, "for n in range(1000): print('line', n)")
    assert "is empty" in here.last_words("job-1", 2)
    ended(here, here.start(TICKET))
    text = here.last_words("job-1", 2)
    assert str(log_file(tmp_path, "job-1", 2)) in text
    assert text.endswith("line 999") and "line 900\n" not in text
