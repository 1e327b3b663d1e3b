"""Job processes on this machine: started in a session of their own, recognised again by pid and start time.

`Launcher` is what the dispatcher needs of any place that runs jobs. A job process outlives the server that started
it, so a handle is text that the store keeps and a later dispatcher understands. The ticket, with the job's token,
goes in by standard input: neither arguments nor environment hold a secret. Output goes to the attempt's log file.

The environment names the attempt (`wire.JOB_MARKER`), and what the job starts inherits that: so the process of an
attempt is found whose handle nobody stored, and its end takes everything with it that reward functions started. What
empties its environment and leaves the session of the job is not found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from rewardsmith.wire import JOB_MARKER

# A job gets these variables and no others: the server's environment may hold secrets that are not the job's.
# HF_* brings the access token for gated base models, which the job loads itself.
PASSED_ON = {
    *("PATH", "HOME", "LANG", "TMPDIR", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME"),
    *("OMP_NUM_THREADS", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
    *("REWARDSMITH_MIN_SANDBOX", "REWARDSMITH_UNSAFE_REWARDS"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
}
# UV_* and PIP_* say where packages for reward functions come from.
PASSED_ON_PREFIXES = ("LC_", "HF_", "CUDA_", "NVIDIA_", "NCCL_", "UV_", "PIP_")
TAIL_BYTES = 64 * 1024
POLL_SECONDS = 0.05
KILL_ROUNDS = 100  # what is killed may just be starting something


@dataclass(frozen=True)
class Ticket:
    """One attempt of a job and the way to the server. `token` opens the journal of this job and fence alone."""

    url: str
    uuid: str
    fence: int
    attempt: int
    token: str = field(repr=False)

    @property
    def marker(self) -> str:
        return _marker(self.uuid, self.attempt)

    def line(self) -> bytes:
        content = {"url": self.url, "uuid": self.uuid, "fence": self.fence, "token": self.token}
        return json.dumps(content).encode() + b"\n"


class Launcher(Protocol):
    def start(self, ticket: Ticket) -> str:
        """Starts the process of an attempt and returns its handle. Raises OSError."""

    def find(self, uuid: str, attempt: int) -> str | None:
        """The handle of the process of an attempt that another dispatcher may have started; None without one."""

    def alive(self, handle: str) -> bool:
        """Whether the process has not ended."""

    def exit_code(self, handle: str) -> int | None:
        """Of a process that ended; None when it is unknown, as for one that another dispatcher started."""

    def stop(self, handle: str, grace_seconds: float) -> None:
        """Asks the process to end, waits, then kills it and all that it left behind."""

    def last_words(self, uuid: str, attempt: int) -> str:
        """Where the log of an attempt is and how it ends, for an error message."""


def log_file(home: Path, uuid: str, attempt: int) -> Path:
    return home / "logs" / uuid / f"attempt-{attempt}.log"


def tail(path: Path, limit: int = TAIL_BYTES) -> str:
    """The last `limit` bytes of a text file from the first whole line on; empty when there is no such file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return text.partition("\n")[2] if size > limit else text


class LocalLauncher:
    """Starts job processes as children. `command` is the program that reads the ticket."""

    def __init__(
        self, home: Path, command: Sequence[str] = (sys.executable, "-P", "-m", "rewardsmith.jobs.entry")
    ) -> None:
        self._home = home
        self._command = list(command)
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, ticket: Ticket) -> str:
        """A new session whose leader reads the ticket. Raises OSError."""
        log = log_file(self._home, ticket.uuid, ticket.attempt)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment() | {JOB_MARKER: ticket.marker},
                cwd=self._home,
                start_new_session=True,
            )
        handle = _handle(psutil.Process(child.pid), ticket.marker)
        self._children[handle] = child
        assert child.stdin is not None
        try:
            with child.stdin as pipe:
                pipe.write(ticket.line())
        except BrokenPipeError:
            pass  # It died before it read a word; the dispatcher finds out from `alive`.
        return handle

    def find(self, uuid: str, attempt: int) -> str | None:
        """The oldest process that carries the marker: the others were started by it."""
        marker = _marker(uuid, attempt)
        carriers = list(_carriers(marker))
        return _handle(min(carriers, key=psutil.Process.create_time), marker) if carriers else None

    def alive(self, handle: str) -> bool:
        """Whether the process is there and no zombie."""
        return self._running(handle) is not None

    def exit_code(self, handle: str) -> int | None:
        """Known of own children only."""
        child = self._children.get(handle)
        return child.poll() if child else None

    def stop(self, handle: str, grace_seconds: float) -> None:
        """SIGTERM, and after the grace SIGKILL for all that belongs to the attempt."""
        if process := self._running(handle):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
            deadline = time.monotonic() + grace_seconds
            while self.alive(handle) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        self._kill_session(handle)
        while self.alive(handle):
            time.sleep(POLL_SECONDS)
        _kill_carriers(_parsed(handle)[2])

    def last_words(self, uuid: str, attempt: int) -> str:
        """The last 15 lines of the attempt's log."""
        log = log_file(self._home, uuid, attempt)
        lines = tail(log, 4096).strip().splitlines()[-15:]
        return f"log {log}, last lines:\n" + "\n".join(lines) if lines else f"log {log} is empty"

    def _running(self, handle: str) -> psutil.Process | None:
        child = self._children.get(handle)
        if child is not None:
            # Not by its state: one whose threads are still ending is a zombie that has no exit status yet.
            return _found(handle) if child.poll() is None else None
        with suppress(psutil.NoSuchProcess):
            process = _found(handle)
            return process if process and process.status() != psutil.STATUS_ZOMBIE else None
        return None

    def _kill_session(self, handle: str) -> None:
        """Kills the job process and the members of its session, which outlive it when it was killed itself."""
        leader, _, _ = _parsed(handle)
        if psutil.pid_exists(leader) and not _found(handle):
            return  # The pid is another process by now, and so is the session.
        for pid in psutil.pids():
            try:
                if os.getsid(pid) == leader:
                    psutil.Process(pid).kill()
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue


def _found(handle: str) -> psutil.Process | None:
    """The process that a handle was made for, also when it is dead and nobody has read its status."""
    pid, started, _ = _parsed(handle)
    try:
        process = psutil.Process(pid)
        # The start time is computed from the boot time, which shifts a little when the clock is set.
        return process if abs(process.create_time() - started) < 1.0 else None
    except psutil.NoSuchProcess:
        return None


def _carriers(marker: str) -> Iterator[psutil.Process]:
    """Processes of this user that were started with the marker in their environment."""
    for process in psutil.process_iter():
        try:
            if process.uids().real == os.getuid() and process.environ().get(JOB_MARKER) == marker:
                yield process
        except (psutil.Error, OSError):
            continue  # It has ended, or its environment is not ours to read.


def _kill_carriers(marker: str) -> None:
    for _ in range(KILL_ROUNDS):
        found = False
        for process in _carriers(marker):
            found = True
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if not found:
            return
        time.sleep(POLL_SECONDS)


def _marker(uuid: str, attempt: int) -> str:
    return f"{uuid}:{attempt}"


def _handle(process: psutil.Process, marker: str) -> str:
    return f"{process.pid}:{process.create_time():.2f}:{marker}"


def _parsed(handle: str) -> tuple[int, float, str]:
    """Pid, start time, marker."""
    pid, started, marker = handle.split(":", 2)
    return int(pid), float(started), marker


def _environment() -> dict[str, str]:
    passed = {
        name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Without PASSIVE, OpenMP threads that share their cores with the server spin away whole time slices.
    return {"OMP_NUM_THREADS": str(cores), **passed, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
