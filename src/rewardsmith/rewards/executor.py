"""One executor seen from outside: frames out and in, every one of them checked, and what it prints past the capture.

Nothing that comes from it is believed beyond its score: a frame that is not due or not lawful marks the executor as
broken. It is made and ended by its sandbox; `pool` decides what it gets to do and what its end means.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from rewardsmith.rewards.calls import Call, Chunk, Result
from rewardsmith.rewards.inside import frames
from rewardsmith.rewards.sandbox.zygote import Log, Sandbox

FORK_SECONDS = 10.0  # in which a sandbox has to come up with an executor


class Executor:
    """`clock` is when its present call may have begun. Raises OSError when there are no descriptors left."""

    def __init__(self, sandbox: Sandbox, number: int) -> None:
        self.sandbox, self.number = sandbox, number
        self.chunks: deque[Chunk] = deque()
        self.started = False
        self.ended: tuple[int | None, str] | None = None  # exit code and why it could not be forked
        self.broken: str | None = None  # "violated" or "closed", the latter since a moment
        self.closing_since: float | None = None
        self.served, self.worn = 0, False
        self.born = self.clock = time.monotonic()
        self.stack_until: float | None = None  # a stack was asked for, and is waited for until then
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()
        ends: list[int] = []
        try:
            for _ in range(3):
                ends += os.pipe()
        except OSError:
            for end in ends:
                os.close(end)
            raise
        request_end, self.request_fd, self.result_fd, result_end, log_fd, log_end = ends
        self.log = Log(log_fd)
        for fd in (self.request_fd, self.result_fd, log_fd):
            os.set_blocking(fd, False)
        sandbox.fork(number, [request_end, result_end, log_end])
        for fd in (request_end, result_end, log_end):
            os.close(fd)

    @property
    def idle(self) -> bool:
        return not self.chunks

    @property
    def fresh(self) -> bool:
        return self.idle and not self.served

    @property
    def readable(self) -> list[int]:
        return [*([] if self.broken else [self.result_fd]), *([self.log.fd] if self.log.open else [])]

    @property
    def writable(self) -> list[int]:
        return [self.request_fd] if self._outgoing else []

    def has_started(self) -> None:
        self.started = True
        self.clock = time.monotonic()

    def give(self, chunk: Chunk) -> None:
        """It may have calls already; these come after them."""
        if self.idle:
            self.clock = time.monotonic()
            self.log.begin()
        self.chunks.append(chunk)
        self.served += len(chunk.calls)
        self._outgoing = memoryview(bytes(self._outgoing) + chunk.order())
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes now. The clock of a first call starts when its order is out."""
        while self._outgoing:
            try:
                written = os.write(self.request_fd, self._outgoing[:65536])
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._outgoing = memoryview(b"")  # the end of the process, or the deadline, says the rest
                return
            self._outgoing = self._outgoing[written:]
            if len(self.chunks) == 1 and not self.chunks[0].done:
                self.clock = time.monotonic()

    def ask_stack(self, until: float) -> None:
        """Have it write into its log where it stands; that is waited for until then."""
        self.stack_until = until
        self.log.begin()
        self.sandbox.ask_stack(self.number)

    @property
    def has_said_stack(self) -> bool:
        """Whether all of it is there; the outermost frame comes last."""
        return b"<reward function" in self.log.tail and self.log.tail.endswith(b"in <module>\n")

    def receive(self) -> Iterator[tuple[Chunk, Call, int, Result]]:
        """The results that have come, each with its call and the place in that. Nobody has to take them all.

        Sets `broken` when something else came, or when the channel has ended.
        """
        for _ in range(0 if self.broken else 16):  # one that writes without end must not keep this process here
            try:
                data = os.read(self.result_fd, 65536)
            except BlockingIOError:
                break
            self._incoming += data
            if not data:
                self.broken, self.closing_since = "closed", time.monotonic()
                break
        try:
            while self.broken != "violated" and (frame := frames.unpack(self._incoming)):
                chunk = next((chunk for chunk in self.chunks if chunk.waiting), None)
                if chunk is None or not chunk.is_due(frame.id):
                    raise frames.Broken
                self.clock = time.monotonic()
                self.stack_until = None
                self.log.begin()
                yield chunk, *chunk.waiting.pop(frame.id), _result(frame)
        except frames.Broken:
            self.broken = "violated"
        if self._incoming and not any(chunk.waiting for chunk in self.chunks):
            self.broken = "violated"

    def close(self) -> None:
        """Give its descriptors back. More than once does no harm."""
        for fd in (self.request_fd, self.result_fd, self.log.fd):
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)
        self.request_fd = self.result_fd = self.log.fd = -1


def _result(frame: frames.Frame) -> Result:
    return Result(
        frame.outcome,
        frame.value,
        frame.seconds,
        frame.prints.decode("utf-8", "replace"),
        frame.error.decode("utf-8", "replace"),
        bool(frame.flags & frames.LEFT_BEHIND),
        bool(frame.flags & frames.WORN),
    )
