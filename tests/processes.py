"""Real server, dispatcher and job processes for tests, on a free loopback port and a home of their own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

import httpx
import psutil

from rewardsmith import Rewardsmith

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, seconds: float = 90) -> T:
    """Polls until the condition holds; fails the test, naming what did not happen."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:g} s: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(home: Path) -> dict[str, str]:
    """This process's environment without its own server and token, one thread for whatever trains."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("REWARDSMITH_", "PREDIBASE_"))}
    return kept | {"REWARDSMITH_HOME": str(home), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def job_process(home: Path) -> psutil.Process | None:
    """The process that runs a job of the server with this home."""
    for process in psutil.process_iter():
        try:
            if "rewardsmith.jobs.entry" in process.cmdline() and process.cwd() == str(home):
                return process if process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            continue
    return None


class Server:
    """`rewardsmith serve` as a process. Leaving the block ends it and everything it started."""

    def __init__(self, home: Path, *options: str, dispatcher: bool = True) -> None:
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._options = [*options, *([] if dispatcher else ["--no-dispatcher"])]
        self._process: subprocess.Popen | None = None
        self._dispatcher: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._dispatcher, self._process):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        while orphan := job_process(self.home):
            orphan.kill()
            orphan.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return (self.home.parent / "server.log").read_text()

    def start(self) -> None:
        self._process = self._spawn("serve", "--port", str(self.port), *self._options)
        wait_until(self._healthy, f"the server answers; it said:\n{self.log}", 60)

    def start_dispatcher(self) -> subprocess.Popen:
        self._dispatcher = self._spawn("dispatcher", "--base-url", self.url)
        return self._dispatcher

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self, how: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(how)
        assert self._process.wait(60) == 0, self.log

    def client(self) -> Rewardsmith:
        return Rewardsmith(api_token=(self.home / "owner-token").read_text().strip(), base_url=self.url)

    def _spawn(self, *arguments: str) -> subprocess.Popen:
        self.home.parent.mkdir(parents=True, exist_ok=True)
        with (self.home.parent / "server.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "rewardsmith", *arguments],
                env=environment(self.home),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _healthy(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the server ended:\n{self.log}"
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False
