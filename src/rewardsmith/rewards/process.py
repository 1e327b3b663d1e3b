"""One worker process seen from outside: starting it, frames out and in, how it ended, killing it.

Nothing that comes from the worker is believed: every frame is checked, and one that breaks the protocol marks the
worker as broken. A worker is bounded in time, memory, output and environment, and can be killed with all it started
(where the job itself was killed, by its launcher, which looks for JOB_MARKER); it runs as the same user, so that
user's files, processes and network are open to it. `pool` decides which calls go to which worker and what a death
means.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from rewardsmith.rewards import worker
from rewardsmith.wire import JOB_MARKER

LOG_TAIL_BYTES = 8192
_SIGNALS = {number.value: number.name for number in signal.Signals}
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of sets, and so a score made from one, is the same in every worker
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
}


def _marker() -> dict[str, str]:
    """Which job this is, where it is one."""
    return {JOB_MARKER: os.environ[JOB_MARKER]} if JOB_MARKER in os.environ else {}


@dataclass(frozen=True)
class Limits:
    """What one worker may use. `call_seconds` is wall time; `output_bytes` what one call may print."""

    call_seconds: float = 5.0
    load_seconds: float = 120.0
    memory_bytes: int = 2 * 2**30
    output_bytes: int = 2**20
    file_bytes: int = 16 * 2**20
    open_files: int = 256


@dataclass(frozen=True, slots=True)
class Result:
    """What a worker said of one call. `outcome` is one of worker.OUTCOMES, or what the pool puts in its place."""

    outcome: str
    value: float
    seconds: float
    prints: str = ""
    error: str = ""
    left_behind: bool = False


class WorkerProcess:
    """A child in a session of its own. The kernel kills it when the thread that called this ends."""

    def __init__(self, scratch: str, limits: Limits) -> None:
        request_end, self.request_fd = os.pipe()
        self.result_fd, result_end = os.pipe()
        # Not `-I`: that would ignore PYTHONHASHSEED, and there is nothing else in the environment to ignore.
        command = [sys.executable, "-s", "-P", "-B", worker.__file__, str(request_end), str(result_end)]
        try:
            self._process = subprocess.Popen(
                [*command, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(request_end, result_end),
                env={**_ENVIRONMENT, **_marker(), "HOME": scratch, "TMPDIR": scratch},
                cwd=scratch,
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            os.close(self.request_fd)
            os.close(self.result_fd)
            raise
        finally:
            os.close(request_end)
            os.close(result_end)
        assert self._process.stdout is not None
        self._log = self._process.stdout
        for fd in (self.request_fd, self.result_fd, self._log.fileno()):
            os.set_blocking(fd, False)
        self.pid = self._process.pid
        self.limits = limits
        self.outstanding = 0
        self.clock = time.monotonic()
        self.broken: str | None = None
        self.log_bytes = 0
        self.log_tail = b""
        self._next_id = 0
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()
        self._stopped = False

    # ---- frames -----------------------------------------------------------------------------------------------------

    def load(self, functions: list[tuple[str, str]]) -> None:
        """Send limits and (name, source) pairs. One result says that the worker is up, then one comes per function."""
        limits = asdict(self.limits)
        bounds = {name: limits[name] for name in ("memory_bytes", "file_bytes", "open_files")}
        order = {"limits": bounds, "output_bytes": self.limits.output_bytes, "functions": functions}
        self._send(order, 1 + len(functions))

    def call(self, groups: list[Any], count: int) -> None:
        """Send `count` calls as [prompt, example as JSON, [[completion, [function index, ...]], ...]] per group."""
        self._send({"groups": groups}, count)

    def _send(self, order: dict[str, Any], results: int) -> None:
        # Ids that user code cannot guess, so that a frame it makes up is seen.
        self._next_id = secrets.randbits(62)
        data = json.dumps({**order, "id": self._next_id}).encode()
        self._outgoing = memoryview(worker.LENGTH.pack(len(data)) + data)
        self.outstanding = results
        self.clock = time.monotonic()
        self.log_bytes = 0
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes now. The clock of the first call starts when the order is out."""
        while self._outgoing:
            try:
                written = os.write(self.request_fd, self._outgoing[:65536])
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._outgoing = memoryview(b"")  # the end of the process, or the deadline, says the rest
                return
            self._outgoing = self._outgoing[written:]
            self.clock = time.monotonic()

    def receive(self) -> list[Result]:
        """The results that have come. Sets `broken` when the channel has ended or something else came through it."""
        for _ in range(16):  # a worker that writes without end must not keep this process here
            try:
                data = os.read(self.result_fd, 65536)
            except BlockingIOError:
                break
            self._incoming += data
            if not data:
                self.broken = "closed"
                break
        results = []
        while result := self._next_result():
            results.append(result)
            self.clock = time.monotonic()
            self.log_bytes = 0
        if self._incoming and self.outstanding == 0:
            self.broken = "violated"
        return results

    def _next_result(self) -> Result | None:
        size = worker.RESULT.size
        if len(self._incoming) < size or self.outstanding == 0:
            return None
        number, outcome, left_behind, value, seconds, *lengths = worker.RESULT.unpack_from(self._incoming)
        lawful = (
            number == self._next_id
            and outcome < len(worker.OUTCOMES)
            and left_behind <= 1
            and abs(value) <= worker.LARGEST_VALUE  # also not NaN
            and seconds >= 0  # also not NaN
            and math.isfinite(seconds)
            and max(lengths) <= worker.MAX_TEXT_BYTES
        )
        if not lawful:
            self.broken = "violated"
            return None
        end = size + sum(lengths)
        if len(self._incoming) < end:
            return None
        prints = self._incoming[size : size + lengths[0]].decode("utf-8", "replace")
        error = self._incoming[size + lengths[0] : end].decode("utf-8", "replace")
        del self._incoming[:end]
        self._next_id += 1
        self.outstanding -= 1
        return Result(worker.OUTCOMES[outcome], value, seconds, prints, error, bool(left_behind))

    # ---- waiting, and what it writes past the capture ---------------------------------------------------------------

    def register(self, selector: selectors.BaseSelector) -> None:
        selector.register(self.result_fd, selectors.EVENT_READ)
        if not self._log.closed:
            selector.register(self._log, selectors.EVENT_READ)
        if self._outgoing:
            selector.register(self.request_fd, selectors.EVENT_WRITE)

    def drain(self) -> None:
        """Read what came on stdout and stderr, keep its end, count what came since the last result."""
        for _ in range(32):
            data = None if self._log.closed else self._log.read(65536)
            if data is None:
                return
            if not data:
                self._log.close()
                return
            self.log_bytes += len(data)
            self.log_tail = (self.log_tail + data)[-LOG_TAIL_BYTES:]

    def stack(self) -> str:
        """Where the Python code stands now, innermost frame first; empty when the worker does not answer."""
        self.drain()
        self.log_tail = b""
        os.kill(self.pid, signal.SIGUSR2)
        give_up = time.monotonic() + 0.2
        while time.monotonic() < give_up:
            before = self.log_tail
            time.sleep(0.002)
            self.drain()
            if self.log_tail == before and b"first):\n  " in before:
                break
        return self._user_lines()

    def _user_lines(self) -> str:
        """The end of the log without the frames of the worker itself."""
        lines = self.log_tail.decode("utf-8", "replace").strip().splitlines()
        return "\n".join(line for line in lines if worker.__file__ not in line)[-worker.KEPT_BYTES :]

    # ---- the end ----------------------------------------------------------------------------------------------------

    def has_ended(self) -> bool:
        return self._status() is not None

    def _status(self) -> os.waitid_result | None:
        """How the process ended, without reaping it: as long as it is a zombie, its number and group stay its own."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def last_words(self) -> str:
        """Why the process ended, for a person, waiting a moment for it to do so; then what it wrote last."""
        give_up = time.monotonic() + 0.5
        while (status := self._status()) is None and time.monotonic() < give_up:
            time.sleep(0.001)
        self.drain()
        if status is None:
            how = "the process closed its channel to the job"
        elif status.si_code == os.CLD_EXITED:
            how = f"the process ended itself with exit code {status.si_status}"
        else:
            name = _SIGNALS.get(status.si_status, f"signal {status.si_status}")
            memory = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
            how = f"the process was ended by {name}{memory}"
        return f"{how}\n{self._user_lines()}".strip()

    def stop(self) -> None:
        """Kill the process and its group, reap it, close the descriptors. More than once does no harm."""
        if self._stopped:
            return
        self._stopped = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        os.close(self.request_fd)
        os.close(self.result_fd)
