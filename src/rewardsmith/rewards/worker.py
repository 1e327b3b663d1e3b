"""Runs reward functions: the one file of Rewardsmith that shares a process with user code.

`process` starts it as a script with two descriptors. Frames of JSON come in: first the functions and limits, then
calls. For each call one frame goes out, a fixed struct with UTF-8 behind it, as soon as the call is over. It judges
return values, captures what is printed and cuts tracebacks; deadlines and deaths are the business of the process
outside, which believes nothing it reads here. Standard library only, and no import of the package: `-P` keeps this
folder off the path, so that user code imports what the interpreter has installed and nothing else.
"""

import ast
import faulthandler
import io
import json
import linecache
import math
import os
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

LENGTH = struct.Struct("<I")
# id, outcome (index in OUTCOMES), whether the call left a thread or process behind, value, seconds, bytes of prints
# and of error text that follow.
RESULT = struct.Struct("<QBBddII")
OUTCOMES = ("ok", "not_a_number", "exception", "out_of_memory", "output_limit", "none")
KEPT_BYTES = 4096  # of the prints, and of the error text, of one call
LARGEST_VALUE = 1e12  # larger ones drown the differences that training compares, and their squares overflow
MAX_TEXT_BYTES = KEPT_BYTES + 100  # with the remark that something was cut
WITHIN = f"return a number from {-LARGEST_VALUE:g} to {LARGEST_VALUE:g}"
STDERR = 2

Verdict = tuple[str, float, str]  # outcome, value, error text


def main(request_fd: int, result_fd: int, parent: int) -> None:
    _die_with(parent)
    for fd in (request_fd, result_fd):
        os.set_inheritable(fd, False)
    faulthandler.enable(STDERR)
    faulthandler.register(signal.SIGUSR2, STDERR, all_threads=False)
    order = _read_frame(request_fd)
    _limit_resources(**order["limits"])
    prints = _Prints(order["output_bytes"])
    reply = _Replies(result_fd, order["id"], prints)
    reply.run(_ready)
    functions: list[Callable[..., Any]] = []
    for name, source in order["functions"]:
        reply.run(_load, functions, source, f"<reward function {name}>")
    while True:
        order = _read_frame(request_fd)
        reply = _Replies(result_fd, order["id"], prints)
        for prompt, example, completions in order["groups"]:
            for completion, called in completions:
                for index in called:
                    reply.run(_score, functions[index], prompt, completion, example)


def _ready() -> Verdict:
    return "ok", 0.0, ""


def _load(functions: list[Callable[..., Any]], source: str, filename: str) -> Verdict:
    functions.append(load_function(source, filename))
    return "ok", 0.0, ""


def _score(function: Callable[..., Any], prompt: str, completion: str, example: str) -> Verdict:
    # Parsed for each call: a function may change its copy of the example.
    return judge(function(prompt, completion, json.loads(example)))


class _Replies:
    """Runs one piece of work after the other and sends each result at once, under consecutive ids."""

    def __init__(self, fd: int, first_id: int, prints: "_Prints") -> None:
        self.fd, self.id, self.prints, self.pid = fd, first_id, prints, os.getpid()
        self.threads, self.children = threading.active_count(), _has_children()
        self.recursion_limit = sys.getrecursionlimit()

    def run(self, work: Callable[..., Verdict], *arguments: Any) -> None:
        self.prints.begin()
        started = perf_counter()
        outcome, value, error = _outcome(work, arguments)
        seconds = perf_counter() - started
        if os.getpid() != self.pid:
            os._exit(0)  # a fork that came back from the function; the call is the parent's
        if self.prints.size > self.prints.limit:
            outcome, value, error = "output_limit", 0.0, f"printed more than {self.prints.limit} bytes"
        self._put_back()
        left_behind = threading.active_count() > self.threads or (_has_children() and not self.children)
        printed, text = self.prints.text(), _cut(error)
        head = (self.id, OUTCOMES.index(outcome), left_behind, value, seconds, len(printed), len(text))
        _write(self.fd, RESULT.pack(*head) + printed + text)
        self.id += 1

    def _put_back(self) -> None:
        """Undo for the next call what this one may have set in the process, as far as that can be done."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.settrace(None)
        sys.setprofile(None)
        sys.setrecursionlimit(self.recursion_limit)


def _outcome(work: Callable[..., Verdict], arguments: tuple[Any, ...]) -> Verdict:
    try:
        return work(*arguments)
    except MemoryError as error:
        return "out_of_memory", 0.0, _traceback(error)
    except BaseException as error:  # SystemExit and KeyboardInterrupt of user code too
        return "exception", 0.0, _traceback(error)


def load_function(source: str, filename: str) -> Callable[..., Any]:
    """The function of `source`, in a namespace of its own, with its imports done so that no call has to pay for them.

    An import that the function is sure to reach must succeed; others are tried. As in `source.compile_function`, the
    annotations of the signature are dropped.
    """
    linecache.cache[filename] = (len(source), None, io.StringIO(source).readlines(), filename)
    tree = ast.parse(source)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    for node in ast.walk(definition):
        if isinstance(node, ast.Import | ast.ImportFrom):
            try:
                exec(compile(ast.Module([node], []), filename, "exec"), {})
            except BaseException:
                if node in definition.body:
                    raise
    namespace: dict[str, Any] = {"__name__": "reward_function"}
    exec(compile(tree, filename, "exec"), namespace)
    function: Callable[..., Any] = namespace[definition.name]
    return function


def judge(answer: object) -> Verdict:
    """What a returned object is worth. Numbers of other libraries are asked for their one item."""
    kind = type(answer)
    if answer is None:
        return "none", 0.0, "returned None (is a return missing?)"
    if not issubclass(kind, int | float) and hasattr(kind, "item"):
        try:
            answer = answer.item()  # type: ignore[attr-defined]
        except Exception as error:
            return (
                "not_a_number",
                0.0,
                f"returned a {kind.__name__} that is not one number ({_cut(str(error)).decode()})",
            )
    # The methods of the base classes: a subclass may have its own idea of its value.
    if issubclass(type(answer), float):
        number = float.__float__(answer)  # type: ignore[arg-type]
    elif issubclass(type(answer), int):
        try:
            number = int.__float__(answer)  # type: ignore[arg-type]
        except OverflowError:
            return "not_a_number", 0.0, f"returned an int too large to compare; {WITHIN}"
    else:
        return "not_a_number", 0.0, f"returned a {kind.__name__}; return an int or a float"
    if not math.isfinite(number):
        return "not_a_number", 0.0, f"returned {number} ({kind.__name__}); return a finite number"
    if abs(number) > LARGEST_VALUE:
        return "not_a_number", 0.0, f"returned {number:g}, too large to compare; {WITHIN}"
    return "ok", number, ""


class _OutputLimit(BaseException):
    """Ends a call that prints too much; a BaseException so that `except Exception` does not swallow it."""


class _Prints(io.RawIOBase):
    """Stands in for stdout and stderr: keeps the beginning of what a call prints, counts all of it."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.size, self.kept = limit, 0, bytearray()

    def begin(self) -> None:
        """Start a call with nothing printed. The streams are new each time: the last call may have closed its own."""
        self.size, self.kept = 0, bytearray()
        sys.stdout = sys.stderr = io.TextIOWrapper(self, "utf-8", "backslashreplace", write_through=True)

    def text(self) -> bytes:
        """At most MAX_TEXT_BYTES of UTF-8."""
        kept = self.kept.decode("utf-8", "ignore" if self.size > len(self.kept) else "backslashreplace")
        dropped = self.size - len(self.kept)
        return (f"{kept}\n[{dropped} more bytes were printed]" if dropped else kept).encode()

    def write(self, data: Any) -> int:
        size = len(data)
        self.size += size
        self.kept += bytes(data[: max(0, KEPT_BYTES - len(self.kept))])
        if self.size > self.limit:
            raise _OutputLimit
        return size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1  # for code that hands sys.stdout to a subprocess

    def close(self) -> None:
        """User code may close its stream; this one goes on."""


def _traceback(error: BaseException) -> str:
    """The traceback from the user's first frame on."""
    frame = error.__traceback__
    while frame and frame.tb_frame.f_code.co_filename == __file__:
        frame = frame.tb_next
    try:
        return "".join(traceback.TracebackException(type(error), error, frame).format())
    except BaseException:  # __str__ of an exception is user code as well
        return f"{type(error).__name__} (its text cannot be made)"


def _cut(text: str) -> bytes:
    """UTF-8 of `text`, without its middle when it is long: both ends of a traceback say something."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= KEPT_BYTES:
        return data
    half = KEPT_BYTES // 2
    head, tail = data[:half].decode("utf-8", "ignore"), data[-half:].decode("utf-8", "ignore")
    return f"{head}\n[{len(data) - 2 * half} bytes cut]\n{tail}".encode()


def _limit_resources(memory_bytes: int, file_bytes: int, open_files: int) -> None:
    import resource

    wanted = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_CORE: 0,
    }
    for kind, amount in wanted.items():
        hard = resource.getrlimit(kind)[1]
        limit = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (limit, limit))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; end now if it already has."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")  # short of memory, the kernel takes this process first
        except OSError:
            pass  # the kernel's own choice stands
    if os.getppid() != parent:
        os._exit(0)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _read_frame(fd: int) -> Any:
    (size,) = LENGTH.unpack(b"".join(_read(fd, LENGTH.size)))
    return json.loads(b"".join(_read(fd, size)))


def _read(fd: int, size: int) -> Iterator[bytes]:
    while size:
        data = os.read(fd, min(size, 2**20))
        if not data:
            os._exit(0)  # the process outside is gone or has no more calls
        size -= len(data)
        yield data


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:4]))
    except BaseException:
        os.write(STDERR, traceback.format_exc().encode(errors="replace"))
        os._exit(1)
