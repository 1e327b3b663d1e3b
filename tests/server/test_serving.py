"""`serve` as a process: home, token, locks, port, an orderly end, and jobs that outlive a kill."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from processes import free_port, wait_until
from server.running import ROWS, job_request

from rewardsmith.errors import ConfigError
from rewardsmith.home import ServerConfig
from rewardsmith.server.serve import serve

FAKE_JOB = Path(__file__).parents[1] / "jobs" / "fake_job.py"
PROGRAM = """
import sys
from pathlib import Path
from rewardsmith.home import ServerConfig
from rewardsmith.errors import RewardsmithError
from rewardsmith.jobs.local import LocalLauncher
from rewardsmith.server.serve import serve
home, port, fake_job, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
try:
    serve(ServerConfig(home=home, port=port), launcher=LocalLauncher(home, [sys.executable, fake_job, mode]))
except RewardsmithError as error:
    sys.exit(f"refused: {error.message}")
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home that is not there yet; whatever job still runs for it in the end is killed."""
    home = tmp_path / "new" / "home"
    yield home
    for process in job_processes(home):
        process.kill()


@contextmanager
def served(home: Path, port: int, mode: str = "hold") -> Iterator[subprocess.Popen[str]]:
    """The process, once it has said that it is ready or has ended."""
    arguments = [sys.executable, "-c", PROGRAM, str(home), str(port), str(FAKE_JOB), mode]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout
        server.said = ""  # type: ignore[attr-defined]
        for line in server.stdout:
            server.said += line  # type: ignore[attr-defined]
            if line.startswith("Stop it"):
                break
        try:
            yield server
        finally:
            server.kill()


def owner(home: Path, port: int) -> httpx.Client:
    token = (home / "owner-token").read_text().strip()
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token}"}, timeout=30)


def start_job(http: httpx.Client) -> str:
    http.post("/v2/repos", json={"name": "sums"}).raise_for_status()
    ticket = http.post("/v2/datasets/upload", json={"fileName": "rows.jsonl"}).json()
    httpx.put(ticket["presignedUrl"], content=ROWS).raise_for_status()
    http.put("/v2/datasets/upload", json={"name": "rows", "uploadToken": ticket["uploadToken"]}).raise_for_status()
    uuid = http.post("/v2/finetuning/jobs", json=job_request()).json()["uuid"]
    wait_until(lambda: job(http, uuid)["step"] == 1, "the job runs", 20)
    return uuid


def job(http: httpx.Client, uuid: str) -> dict:
    return http.get(f"/v2/finetuning/jobs/{uuid}").json()


def job_processes(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(FAKE_JOB) in process.cmdline() and process.cwd() == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_the_first_start_makes_a_private_home_and_token_and_says_where(home: Path):
    port = free_port()
    with served(home, port) as server:
        token_file = home / "owner-token"
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
        token = token_file.read_text().strip()
        assert token.startswith("pb_") and len(token) > 40
        for expected in (f"http://127.0.0.1:{port}", str(home), str(token_file)):
            assert expected in server.said
        assert token not in server.said
        answer = httpx.get(f"http://127.0.0.1:{port}/users/current", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 200
        assert "server" not in answer.headers
        listening = {c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        server.terminate()
        assert server.wait(20) == 0
        assert server.stderr and token not in server.stderr.read()
    token_file.chmod(0o644)
    with served(home, port) as server:
        assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
        assert token_file.read_text().strip() == token
        with owner(home, port) as http:
            assert http.get("/users/current").status_code == 200


def test_a_home_or_a_port_in_use_is_refused_in_a_sentence(home: Path, tmp_path: Path):
    port = free_port()
    with served(home, port) as first:
        with served(home, free_port()) as second:
            assert second.wait(20) == 1 and second.stderr
            said = second.stderr.read()
            assert f"process {first.pid}" in said and str(home) in said and "Traceback" not in said
        with served(tmp_path / "other", port) as third:
            assert third.wait(20) == 1 and third.stderr
            said = third.stderr.read()
            assert f"127.0.0.1:{port}" in said and "in use" in said and "Traceback" not in said
        with owner(home, port) as http:
            assert http.get("/users/current").status_code == 200


def test_other_machines_are_let_in_only_on_request(tmp_path: Path):
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(ConfigError, match="--allow-remote"):
            serve(ServerConfig(home=tmp_path / "home", host=host, port=0))
    assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="REWARDSMITH_HOME"):
        serve(ServerConfig(home=tmp_path / "file" / "home", port=0))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_server_and_jobs_and_leaves_no_process(home: Path, how: signal.Signals):
    port = free_port()
    with served(home, port, "family") as server:
        with owner(home, port) as http:
            uuid = start_job(http)
            with http.stream("GET", f"/v2/finetuning/jobs/{uuid}/events/stream") as stream:
                next(stream.iter_lines())
                family = psutil.Process(server.pid).children(recursive=True)
                assert any(str(FAKE_JOB) in process.cmdline() for process in family)
                server.send_signal(how)
                assert server.wait(20) == 0, "an open stream does not keep it"
        assert all(gone(process) for process in family)
    with served(home, port) as server, owner(home, port) as http:
        wait_until(lambda: job(http, uuid)["attempt"] == 2 and job(http, uuid)["step"] == 1, "it goes on", 20)


def test_a_job_outlives_a_killed_server_and_is_taken_over_by_the_next(home: Path):
    port = free_port()
    with served(home, port) as server:
        with owner(home, port) as http:
            uuid = start_job(http)
        (process,) = job_processes(home)
        os.kill(server.pid, signal.SIGKILL)
        server.wait(10)
    assert process.is_running()
    with served(home, port) as server, owner(home, port) as http:
        assert job(http, uuid)["attempt"] == 1
        http.post(f"/v2/finetuning/jobs/{uuid}/cancel").raise_for_status()
        wait_until(lambda: job(http, uuid)["status"] == "canceled", "it hears the new server", 20)
        assert job(http, uuid)["attempt"] == 1
        wait_until(lambda: gone(process), "its process ends", 20)
