"""What user code prints, call by call: the beginning is kept, all of it is counted.

Calls that share an event loop each have a capture of their own, by context. What is written past `sys.stdout`, to the
descriptor itself, goes to the log that the pool reads. Standard library only.
"""

import io
import sys
from contextvars import ContextVar
from typing import Any

from .frames import KEPT_BYTES


class OutputLimit(BaseException):
    """Ends a call that prints too much; a BaseException so that `except Exception` does not swallow it."""


class Capture:
    """The prints of one call."""

    __slots__ = ("kept", "size")

    def __init__(self) -> None:
        self.size, self.kept = 0, bytearray()

    def text(self) -> bytes:
        """At most frames.MAX_TEXT_BYTES of UTF-8."""
        if not self.size:
            return b""
        kept = self.kept.decode("utf-8", "ignore" if self.size > len(self.kept) else "backslashreplace")
        dropped = self.size - len(self.kept)
        return (f"{kept}\n[{dropped} more bytes were printed]" if dropped else kept).encode()


class Prints(io.RawIOBase):
    """Stands in for stdout and stderr."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.capture = limit, Capture()
        self.of_context: ContextVar[Capture | None] = ContextVar("prints", default=None)

    def begin(self) -> Capture:
        """Start a call with nothing printed. The streams are new each time: the last call may have closed its own."""
        self.capture = Capture()
        sys.stdout = sys.stderr = io.TextIOWrapper(self, "utf-8", "backslashreplace", write_through=True)
        return self.capture

    def begin_in_context(self) -> Capture:
        """The same for the code that runs in this context only."""
        capture = Capture()
        self.of_context.set(capture)
        return capture

    def write(self, data: Any) -> int:
        capture = self.of_context.get() or self.capture
        size = len(data)
        capture.size += size
        if len(capture.kept) < KEPT_BYTES:
            capture.kept += bytes(data[: KEPT_BYTES - len(capture.kept)])
        if capture.size > self.limit:
            raise OutputLimit
        return size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1  # for code that hands sys.stdout to a subprocess

    def close(self) -> None:
        """User code may close its stream; this one goes on."""
