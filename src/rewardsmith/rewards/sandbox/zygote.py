"""One sandbox seen from outside: it is started with the functions to load, then asked for executors.

What its first process says is checked and believed no further than it must be: a message that is not of the protocol
marks the sandbox as broken, and nobody but the process that was started here is ever killed by its number. The kernel
ends a sandbox with the thread that started it, so all of a pool's are started by one thread that lives as long.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rewardsmith.rewards.inside import frames
from rewardsmith.rewards.sandbox import probe
from rewardsmith.rewards.sandbox.build import Launch, launch
from rewardsmith.rewards.sandbox.limits import Limits
from rewardsmith.rewards.sandbox.tiers import Tier

LOG_TAIL_BYTES = 8192
MAX_MESSAGE = 65536
STOP_SECONDS = 2.0
_OUTERMOST = tuple(f'/inside/{name}.py"' for name in ("judge", "loading", "together", "worker", "zygote"))


class Door(Protocol):
    """The way out of sandboxes to the network: who takes the connections to a port in them."""

    port: int

    def attach(self, listener: socket.socket) -> None: ...

    def detach(self, listener: socket.socket) -> None: ...


class Source(NamedTuple):
    """A function to load. `forked`: each of its calls gets a process of its own."""

    name: str
    text: str
    forked: bool


@dataclass(frozen=True)
class Hardened:
    """From here on, user code is loaded."""


@dataclass(frozen=True)
class Loaded:
    index: int


@dataclass(frozen=True)
class Failed:
    """`index` is the function's, less than 0 when it is the sandbox itself that could not be set up."""

    index: int
    outcome: str
    error: str


@dataclass(frozen=True)
class Ready:
    """With more than one thread the sandbox can have one executor only."""

    threads: int


@dataclass(frozen=True)
class Forked:
    number: int


@dataclass(frozen=True)
class Ended:
    """An executor is gone with all it started. `code` as in `subprocess`, None when it could not be forked."""

    number: int
    code: int | None
    error: str


Event = Hardened | Loaded | Failed | Ready | Forked | Ended


@dataclass
class Log:
    """What comes through a pipe for a person to read: the end of it is kept, all of it is counted."""

    fd: int
    size: int = 0
    tail: bytes = b""
    open: bool = True

    def drain(self) -> None:
        for _ in range(32):
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                return
            if not data:
                self.open = False
                return
            self.size += len(data)
            self.tail = (self.tail + data)[-LOG_TAIL_BYTES:]

    def begin(self) -> None:
        self.size, self.tail = 0, b""

    def text(self) -> str:
        """The end of the log without the frames of our own code, which are the outermost ones of every stack."""
        kept: list[str] = []
        ours = False
        for line in self.tail.decode("utf-8", "replace").strip().splitlines():
            ours = line.startswith("  File ") and (ours or line.partition(",")[0].endswith(_OUTERMOST))
            if not line.startswith("  File ") and kept and kept[-1].endswith("(most recent call first):"):
                kept.pop()  # a stack of nothing but our own frames
            if not ours:
                kept.append(line)
        text = "\n".join(kept)
        cut = max(self.size - LOG_TAIL_BYTES, 0) + max(len(text) - frames.KEPT_BYTES, 0)
        return f"[{cut} bytes cut]\n{text[-frames.KEPT_BYTES :]}" if cut else text


@dataclass(eq=False)
class Sandbox:
    """Starts at once; `receive` says how loading goes. Raises SandboxError, or OSError, when it cannot be started.

    `clock` is when it last came further. `threads` is None until everything is loaded.
    """

    functions: Sequence[Source]
    tier: Tier
    limits: Limits
    site_dirs: Sequence[Path]
    environment: Mapping[str, str]
    door: Door | None = None
    threads: int | None = None
    hardened: bool = False
    loaded: int = 0
    broken: str | None = None
    _outgoing: memoryview = field(default=memoryview(b""), repr=False)

    def __post_init__(self) -> None:
        self.clock = time.monotonic()
        self.dying: dict[int, float] = {}  # executors that were to be killed, since when
        self._scratch = None if self.tier >= Tier.S2 else Path(tempfile.mkdtemp(prefix="rewardsmith-rewards-"))
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        order_end, self._order_fd = os.pipe()
        log_fd, log_end = os.pipe()
        self.log = Log(log_fd)
        self._process: subprocess.Popen[bytes] | None = None
        self._launch: Launch | None = None
        self._memory_kills = 0
        self._listener: socket.socket | None = None  # the door's, in the sandbox's network
        try:
            self._launch = launch(
                self.tier,
                self.limits,
                control_fd=theirs.fileno(),
                order_fd=order_end,
                site_dirs=self.site_dirs,
                environment=self.environment,
                scratch=self._scratch,
                connect=[self.door.port] if self.door else [],
                proc=self.tier < Tier.S2 or probe.report().proc,
            )
            self._process = subprocess.Popen(
                self._launch.argv,
                stdin=subprocess.DEVNULL,
                stdout=log_end,
                stderr=log_end,
                pass_fds=self._launch.pass_fds,
                env=self._launch.env,
                cwd=self._launch.cwd,
                start_new_session=True,
            )
        except BaseException:
            self.stop()
            raise
        finally:
            theirs.close()
            os.close(order_end)
            os.close(log_end)
        for fd in (self._control.fileno(), self._order_fd, log_fd):
            os.set_blocking(fd, False)
        settings = {name: getattr(self.limits, name) for name in ("call_seconds", "load_seconds")}
        settings |= {name: getattr(self.limits, name) for name in ("memory_bytes", "output_bytes")}
        order = {
            "plan": self._launch.plan,
            "site_dirs": [str(folder) for folder in self.site_dirs],
            "functions": self.functions,
            "limits": settings,
            "scratch": self._scratch and str(self._scratch),
            "door": self.door and self.door.port,
        }
        self._outgoing = memoryview(frames.order(json.dumps(order)))
        self.flush()

    # ---- talking to it ----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self.threads is not None

    @property
    def readable(self) -> list[int]:
        return [self._control.fileno(), *([self.log.fd] if self.log.open else [])]

    @property
    def writable(self) -> list[int]:
        return [self._order_fd] if self._outgoing else []

    def flush(self) -> None:
        """Write what the pipe takes of the order now; the end of the pipe is the end of the order."""
        with suppress(BlockingIOError):
            while self._outgoing:
                self._outgoing = self._outgoing[self._write(self._outgoing[:65536]) :]
            if self._order_fd >= 0:
                os.close(self._order_fd)
                self._order_fd = -1

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._order_fd, data)
        except BrokenPipeError:
            return len(self._outgoing)  # the end of the process says the rest

    def fork(self, number: int, descriptors: Sequence[int]) -> None:
        """Ask for an executor with these descriptors: read end of requests, write ends of results and of its log."""
        self._tell(number, "fork", descriptors)

    def ask_stack(self, number: int) -> None:
        """Have an executor write into its log where it stands."""
        self._tell(number, "stack")

    def kill(self, number: int) -> None:
        """End an executor with all it started. One that has not ended after 2 s takes the sandbox along."""
        self.dying[number] = time.monotonic()
        self._tell(number, "kill")

    def _tell(self, number: int, what: str, descriptors: Sequence[int] = ()) -> None:
        message = json.dumps({"do": what, "number": number}).encode()
        try:
            socket.send_fds(self._control, [message], descriptors)
        except OSError as error:  # it is gone, or has stopped to listen
            self.broken = self.broken or f"the sandbox does not take orders any more: {error}"

    def _hear(self) -> bytes:
        """The next message. The very first one brings the door along, where there is one; no other brings anything."""
        if self.door is None or self._listener is not None:
            return self._control.recv(MAX_MESSAGE)
        data, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 1)
        if not descriptors:
            return data
        self._listener = socket.socket(fileno=descriptors[0])
        self.door.attach(self._listener)
        return self._hear()

    def receive(self) -> list[Event]:
        """What it has said since the last call. Sets `broken` when it has ended or does not keep to the protocol."""
        self.log.drain()
        events: list[Event] = []
        while self.broken is None and len(events) < 1000:
            try:
                data = self._hear()
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            if not data:
                self.broken = self._last_words()
                break
            try:
                events.append(_event(json.loads(data)))
            except (ValueError, KeyError, TypeError, RecursionError):
                self.broken = "the sandbox broke the protocol"
                break
            self._take(events[-1])
        if self.broken is None and any(time.monotonic() > since + STOP_SECONDS for since in self.dying.values()):
            self.broken = f"an executor could not be ended within {STOP_SECONDS:g} s"
        return events

    def _take(self, event: Event) -> None:
        if isinstance(event, Hardened):
            self.hardened = True
        elif isinstance(event, Loaded):
            self.loaded = event.index + 1
            self.log.begin()
        elif isinstance(event, Failed):
            self.hardened, self.broken = event.index >= 0, event.error
        elif isinstance(event, Ready):
            self.threads = event.threads
        elif isinstance(event, Ended):
            self.dying.pop(event.number, None)
        self.clock = time.monotonic()

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel has ended a process for that since this was last asked."""
        before, self._memory_kills = self._memory_kills, self._launch.memory_kills() if self._launch else 0
        return self._memory_kills > before

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _last_words(self) -> str:
        assert self._process
        try:
            code = self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            return "the sandbox closed its channel to the job"
        self.log.drain()
        # bubblewrap and the shell report a signal in this way
        return f"{frames.ending(128 - code if code > 128 else code)}\n{self.log.text()}".strip()

    def stop(self) -> None:
        """End everything in it, remove its files. More than once does no harm."""
        self._control.close()
        if self.door and self._listener:
            self.door.detach(self._listener)
            self._listener = None
        if self._process and self._process.returncode is None:
            if self._scratch and self.ready:
                # Executors have sessions of their own here; told by the closed socket, their parent knows how to end
                # them, and what they left running.
                _await_end(self._process.pid)
            # Also where it has ended by itself: it is not reaped yet, so the group is still its own.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._launch:
            self._launch.close()
            self._launch = None
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
        for fd in (self._order_fd, self.log.fd):
            if fd >= 0:
                os.close(fd)
        self._order_fd = self.log.fd = -1
        self._outgoing = memoryview(b"")
        self.broken = self.broken or "stopped"


def _await_end(pid: int) -> None:
    """For STOP_SECONDS at most, without reaping."""
    give_up = time.monotonic() + STOP_SECONDS
    while time.monotonic() < give_up:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)


def _event(message: dict[str, Any]) -> Event:
    """Raises ValueError, KeyError or TypeError for what is no message of the protocol."""
    if "hardened" in message:
        return Hardened()
    if "loaded" in message:
        return Loaded(_count(message["loaded"]))
    if "failed" in message:
        return Failed(int(message["failed"]), str(message["outcome"]), str(message["error"])[: frames.MAX_TEXT_BYTES])
    if "ready" in message:
        return Ready(_count(message["threads"]))
    if "forked" in message:
        return Forked(_count(message["forked"]))
    number, code, by_signal = message["ended"], message["exit"], message["signal"]
    code = -_count(by_signal) if code is None and by_signal is not None else code
    return Ended(_count(number), code if code is None else int(code), str(message["error"])[: frames.MAX_TEXT_BYTES])


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"{value!r} is no count")
    return value
