"""What reward functions may import inside the sandbox: `from reward_tools import run_python`.

A program that a model wrote runs in a process that has never seen the call: beside every executor waits a runner,
forked before the first call came, and forks for each program a child that can write no file, start no process, signal
nothing and hold no descriptor but its own input and output. So a program can neither set its own score nor find the
row's answer in memory; what it can see is what the sandbox has loaded, the text of the reward functions included.
Standard library only.
"""

import ctypes
import faulthandler
import io
import math
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from contextlib import ExitStack, suppress
from typing import NamedTuple, NoReturn, TextIO, cast

from . import harden, seccomp

_ORDER = struct.Struct("<dQ")  # seconds, bytes of memory; behind it travel the four descriptors of _run
_STATUS = struct.Struct("<i")
_LENGTH = struct.Struct("<Q")
_OPEN_FILES = 64
_runner: socket.socket | None = None
_reason = "run_python works in reward functions only"


class PythonRun(NamedTuple):
    """How a program ended. `rc` is its exit code, or less than 0 the signal that killed it, as in `subprocess`.

    `timeout`: it was killed when its time was over. A program that printed more than it may is killed too (rc -9).
    """

    out: str
    err: str
    rc: int
    timeout: bool


def run_python(
    code: str,
    *,
    stdin: str = "",
    seconds: float = 2.0,
    memory_bytes: int = 256 * 2**20,
    output_bytes: int = 64 * 2**10,
) -> PythonRun:
    """Runs `code` as a program of its own and waits for its end, `seconds` of wall time at most.

    It sees the modules that reward functions import. `memory_bytes` is what it may take beyond what is loaded;
    `output_bytes` holds for `out` and for `err`. Raises RuntimeError where programs cannot be run.
    """
    if _runner is None:
        raise RuntimeError(_reason)
    text = code.encode("utf-8", "surrogatepass")
    source = _LENGTH.pack(len(text)) + text + stdin.encode("utf-8", "surrogatepass")
    with ExitStack() as open_ends:  # its end ends the program, if that still runs
        (program_in, to_program), (out, out_end), (err, err_end), (status, status_end) = (
            [open_ends.enter_context(io.FileIO(fd, mode)) for fd, mode in zip(os.pipe(), "rw", strict=True)]
            for _ in range(4)
        )
        theirs = [program_in, out_end, err_end, status_end]
        socket.send_fds(_runner, [_ORDER.pack(seconds, memory_bytes)], [end.fileno() for end in theirs])
        for end in theirs:
            end.close()
        return _follow(to_program, source, out, err, status, seconds, output_bytes)


def _follow(
    to_program: io.FileIO,
    source: bytes,
    out: io.FileIO,
    err: io.FileIO,
    status: io.FileIO,
    seconds: float,
    output_bytes: int,
) -> PythonRun:
    """Feeds the program, and collects what it says until it has ended or must."""
    unsent = memoryview(source)
    said = {pipe.fileno(): (pipe, bytearray()) for pipe in (out, err)}
    poll = select.poll()
    for pipe in (to_program, out, err, status):
        os.set_blocking(pipe.fileno(), False)
        poll.register(pipe, select.POLLOUT if pipe is to_program else select.POLLIN)
    give_up = time.monotonic() + seconds
    rc = None
    while rc is None and (left := give_up - time.monotonic()) > 0:
        for fd, _ in poll.poll(math.ceil(1000 * left)):
            if fd in said:
                if not _collect(*said[fd]):
                    poll.unregister(fd)
            elif fd == status.fileno():
                answer = status.read(_STATUS.size)
                rc = _STATUS.unpack(answer)[0] if answer else -signal.SIGKILL
            else:
                with suppress(BrokenPipeError):  # it reads no further
                    unsent = unsent[to_program.write(unsent[:65536]) or 0 :]
                    if unsent:
                        continue
                poll.unregister(fd)
                to_program.close()  # the end of its standard input
        if any(len(data) > output_bytes for _, data in said.values()):
            rc = -signal.SIGKILL
    for pipe, data in said.values():
        while len(data) <= output_bytes and _collect(pipe, data):
            pass
    texts = [bytes(data[:output_bytes]).decode("utf-8", "replace") for _, data in said.values()]
    return PythonRun(texts[0], texts[1], -signal.SIGKILL if rc is None else rc, rc is None)


def _collect(pipe: io.FileIO, data: bytearray) -> bool:
    """Whether there was something to read."""
    part = pipe.read(65536)
    data += part or b""
    return bool(part)


# ---- the two ends of the line ---------------------------------------------------------------------------------------


def connect(runner: socket.socket | None, reason: str = _reason) -> None:
    """Where programs go to in this process; without a runner, `reason` says why they cannot run."""
    global _runner, _reason
    _runner, _reason = runner, reason


def serve(requests: socket.socket, confined: bool) -> NoReturn:
    """The runner: one program after the other, until its executor has ended. `confined`: the sandbox has a filter."""
    _forget_environment()
    connect(None, "a program cannot start programs")
    while True:
        order, ancillary, _, _ = requests.recvmsg(_ORDER.size, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
        descriptors = [fd for _, _, data in ancillary for fd in struct.unpack(f"{len(data) // 4}i", data)]
        if not order or len(order) != _ORDER.size or len(descriptors) != 4:
            os._exit(0)
        program_in, out, err, status = descriptors
        seconds, memory_bytes = _ORDER.unpack(order)
        child = os.fork()
        if not child:
            _become_program(program_in, out, err, seconds, memory_bytes, confined)
        for fd in (program_in, out, err):
            os.close(fd)
        watch = os.pidfd_open(child)
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        poll.register(status, 0)  # an error: nobody waits for this program any longer
        poll.poll()
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(BrokenPipeError):
            os.write(status, _STATUS.pack(code))
        os.close(watch)
        os.close(status)


def _become_program(program_in: int, out: int, err: int, seconds: float, memory_bytes: int, confined: bool) -> NoReturn:
    code = 1
    try:
        with suppress(PermissionError):  # denied where a sandbox has no processes of its own to see
            os.setpgid(0, 0)
        for number, fd in enumerate((program_in, out, err)):
            os.dup2(fd, number)
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        _limit(seconds, memory_bytes)
        harden.enclose(["/"], ["/dev/null"])
        if confined:
            seccomp.refuse_processes()
        faulthandler.disable()  # what is said of a crash is the business of programs
        text = _read(_LENGTH.unpack(_read(_LENGTH.size))[0]).decode("utf-8", "surrogatepass")
        sys.stdin, sys.stdout, sys.stderr = _stream(0, "r", -1), _stream(1, "w", -1), _stream(2, "w", 1)
        sys.argv = ["program"]
        code = _execute(text)
        with suppress(Exception):  # it may have closed it, or nobody listens any more
            sys.stdout.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)


def _stream(fd: int, mode: str, buffering: int) -> TextIO:
    errors = "replace" if mode == "r" else "backslashreplace"
    return cast(TextIO, os.fdopen(fd, mode, buffering, encoding="utf-8", errors=errors, closefd=False))


def _execute(text: str) -> int:
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    try:
        exec(compile(text, "<program>", "exec"), main.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        frame = error.__traceback__.tb_next if error.__traceback__ else None  # from the program's first one on
        traceback.print_exception(type(error), error, frame)
        return 1
    return 0


def _limit(seconds: float, memory_bytes: int) -> None:
    limits: dict[int, int] = {
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,
        resource.RLIMIT_AS: _address_space() + memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, amount in limits.items():
        hard = resource.getrlimit(kind)[1]
        amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (amount, amount))


def _address_space() -> int:
    """Bytes of address space that this process has, found by asking for more: not every sandbox has /proc."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    low, high = 0, 2**47 if hard == resource.RLIM_INFINITY else hard  # in use is more than low, and at most high
    while high - low > 2**20:
        middle = (low + high) // 2
        resource.setrlimit(resource.RLIMIT_AS, (middle, hard))
        try:
            mmap.mmap(-1, mmap.PAGESIZE).close()
            high = middle
        except (OSError, MemoryError):
            low = middle
    return high


def _forget_environment() -> None:
    """Wipes what this process was started with, so that no program finds a secret of the reward functions."""
    environment = ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), "environ")
    place = 0
    while environment and (entry := environment[place]):
        ctypes.memset(entry, 0, len(ctypes.string_at(entry)))
        place += 1
    os.environ.clear()


def _read(size: int) -> bytes:
    data = b""
    while len(data) < size and (part := os.read(0, size - len(data))):
        data += part
    return data
