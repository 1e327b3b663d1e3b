"""The frames between the pool and an executor, for both ends: orders as JSON, results as a struct with text behind it.

The pool believes nothing that it reads, so `unpack` checks a result completely; which id is due is up to who reads.
Standard library only and no import of the package: this file is also in the sandbox.
"""

import json
import math
import os
import signal
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

LENGTH = struct.Struct("<I")
# id, outcome (index in OUTCOMES), flags, value, seconds, bytes of prints and of error text that follow
_RESULT = struct.Struct("<QBBddII")
OUTCOMES = (
    *("ok", "not_a_number", "exception", "timeout", "crash", "out_of_memory", "output_limit"),
    "none",  # returned None; the pool knows whether that is an abstention
)
_NUMBER_OF = {outcome: number for number, outcome in enumerate(OUTCOMES)}
_SIGNALS = {number.value: number.name for number in signal.Signals}
LEFT_BEHIND, WORN = 1, 2  # flags: a thread or process is left; the executor has grown too much to go on
LARGEST_VALUE = 1e12  # larger ones drown the differences that training compares, and their squares overflow
KEPT_BYTES = 4096  # of the prints, and of the error text, of one call
MAX_TEXT_BYTES = KEPT_BYTES + 100  # with the remark that something was cut


class Broken(Exception):
    """What came is no frame of the protocol."""


class Frame(NamedTuple):
    """One result: of a call, or of one completion in a call for a whole group. Text is UTF-8, as it came."""

    id: int
    outcome: str
    flags: int
    value: float
    seconds: float
    prints: bytes
    error: bytes


def pack(frame: Frame) -> bytes:
    number, outcome, flags, value, seconds, prints, error = frame
    head = _RESULT.pack(number, _NUMBER_OF[outcome], flags, value, seconds, len(prints), len(error))
    return head + prints + error


def unpack(data: bytearray) -> Frame | None:
    """Takes the first frame off `data`; None when it is not all there. Raises Broken for what is unlawful."""
    size = _RESULT.size
    if len(data) < size:
        return None
    number, outcome, flags, value, seconds, prints, error = _RESULT.unpack_from(data)
    lawful = (
        outcome < len(OUTCOMES)
        and flags <= LEFT_BEHIND | WORN
        and abs(value) <= LARGEST_VALUE  # also not NaN
        and seconds >= 0  # also not NaN
        and math.isfinite(seconds)
        and prints <= MAX_TEXT_BYTES
        and error <= MAX_TEXT_BYTES
    )
    if not lawful:
        raise Broken
    end = size + prints + error
    if len(data) < end:
        return None
    texts = bytes(data[size:end]) if end > size else b""
    del data[:end]
    return Frame(number, OUTCOMES[outcome], flags, value, seconds, texts[:prints], texts[prints:])


def read_order(fd: int) -> Any:
    """The next order. Raises EOFError when the other end is closed."""
    (size,) = LENGTH.unpack(b"".join(_read(fd, LENGTH.size)))
    return json.loads(b"".join(_read(fd, size)))


def order(text: str) -> bytes:
    """JSON text as it goes to `read_order`. Lone surrogates, which models do write, are escaped by `json.dumps`."""
    data = text.encode()
    return LENGTH.pack(len(data)) + data


def ending(code: int) -> str:
    """How a process ended, for a person; `code` as in `subprocess`, negative for a signal."""
    if code >= 0:
        return f"the process ended itself with exit code {code}"
    name = _SIGNALS.get(-code, f"signal {-code}")
    memory = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
    return f"the process was ended by {name}{memory}"


def write(fd: int, data: bytes) -> None:
    """All of it, to a descriptor that blocks."""
    while data:
        data = data[os.write(fd, data) :]


def _read(fd: int, size: int) -> Iterator[bytes]:
    while size:
        data = os.read(fd, min(size, 2**20))
        if not data:
            raise EOFError
        size -= len(data)
        yield data
