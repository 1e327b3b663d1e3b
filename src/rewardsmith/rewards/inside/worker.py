"""An executor: runs reward functions, in a process that it shares with user code, and sends a frame for each result.

The zygote forks it with everything loaded. Orders come in by one descriptor; a frame goes out by another as soon as a
call is over. Calls run on the main thread, one after the other; those of `async def` functions run together, in
`together`. A function that runs what models wrote gets a process for each call: the executor forks it, and it holds
nothing but a pipe of its own. Deadlines and deaths are the business of the pool outside, which believes nothing it
reads here. Standard library only.
"""

import _thread
import faulthandler
import marshal
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple, NoReturn

from .frames import LEFT_BEHIND, WORN, Broken, Frame, ending, pack, read_order, unpack, write
from .judge import Verdict, cut, judge, judge_error, judge_group
from .loading import Function
from .prints import Capture, Prints

WORN_SHARE = 0.7  # of the memory limit
WORN_DESCRIPTORS = 16  # left open
STDERR = 2


class Call(NamedTuple):
    """`text` is a completion, or the list of all completions of the prompt. `row` is the example, marshalled: each call
    gets an example of its own, and this is several times faster than to parse or to copy it."""

    function: Function
    prompt: str
    text: str | list[str]
    row: bytes
    id: int

    @property
    def width(self) -> int:
        return 1 if isinstance(self.text, str) else len(self.text)

    def start(self) -> Any:
        text = self.text if isinstance(self.text, str) else list(self.text)
        return self.function.call(self.prompt, text, marshal.loads(self.row))

    def judge(self, answer: object) -> list[Verdict]:
        return [judge(answer)] if isinstance(self.text, str) else judge_group(answer, len(self.text))


class Executor:
    def __init__(
        self,
        request_fd: int,
        result_fd: int,
        functions: list[Function],
        settings: dict[str, Any],
        enclose: Callable[[], None],
    ) -> None:
        self.request_fd, self.result_fd = request_fd, result_fd
        self.functions, self.settings, self.enclose = functions, settings, enclose
        self.prints = Prints(settings["output_bytes"])
        self.pid, self.child, self.is_fork = os.getpid(), 0, False
        self.left = 0  # results of this order that are still to be sent
        self.threads = _thread._count()
        self.recursion_limit = sys.getrecursionlimit()
        self.descriptors = self.lowest_free_descriptor()
        # The stack goes to the log; where a fork runs the call, that is asked as well.
        signal.signal(signal.SIGUSR2, self._pass_on)
        faulthandler.register(signal.SIGUSR2, STDERR, all_threads=False, chain=True)

    def serve(self) -> NoReturn:
        try:
            while True:
                order = read_order(self.request_fd)
                self.left = order["count"]
                calls = self._calls(order)
                if order["concurrency"]:
                    from . import together  # loaded by the zygote where a function needs it

                    together.run(self, calls, order["concurrency"])
                else:
                    for call in calls:
                        self.run(call)
        except EOFError:
            os._exit(0)  # the pool has no more calls
        except BaseException:
            die()

    def _calls(self, order: dict[str, Any]) -> list[Call]:
        calls, number = [], order["id"]
        for prompt, example, texts in order["groups"]:
            row = marshal.dumps(example)
            for text, called in texts:
                for index in called:
                    calls.append(Call(self.functions[index], prompt, text, row, number))
                    number += calls[-1].width
        return calls

    # ---- one call ---------------------------------------------------------------------------------------------------

    def run(self, call: Call) -> None:
        if call.function.forked and not self.is_fork:
            self._run_in_fork(call)
            return
        capture = self.prints.begin()
        started = perf_counter()
        try:
            answer = call.start()
            if call.function.is_async:
                import asyncio

                answer = asyncio.run(answer)
            verdicts = call.judge(answer)
        except BaseException as error:
            verdicts = [judge_error(error)] * call.width
        seconds = perf_counter() - started
        if os.getpid() != self.pid:
            os._exit(0)  # a fork that came back from the function; the call is its parent's
        self.put_back()
        left_behind = _thread._count() > self.threads or has_children()
        self.send(call, verdicts, seconds, capture, LEFT_BEHIND if left_behind else 0)

    def send(self, call: Call, verdicts: list[Verdict], seconds: float, capture: Capture, flags: int) -> None:
        """The results of a call. Its prints go with the first, the flags with the last one."""
        if capture.size > self.prints.limit:
            fault = f"printed more than {self.prints.limit} bytes"
            verdicts = [("output_limit", 0.0, fault)] * call.width
        prints = capture.text()
        parts = [
            Frame(call.id + place, outcome, 0, value, seconds, b"" if place else prints, cut(error) if error else b"")
            for place, (outcome, value, error) in enumerate(verdicts)
        ]
        self._send_frames(parts, flags)

    def _send_frames(self, parts: list[Frame], flags: int) -> None:
        self.left -= len(parts)
        if not self.left and self._is_worn():
            flags |= WORN
        parts[-1] = parts[-1]._replace(flags=flags)
        write(self.result_fd, b"".join(map(pack, parts)))

    def put_back(self) -> None:
        """Undo for the next call what this one may have set in the process, as far as that can be done."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.settrace(None)
        sys.setprofile(None)
        sys.setrecursionlimit(self.recursion_limit)

    def _is_worn(self) -> bool:
        # The peak: what is resident now can only be read in /proc, which not every sandbox has.
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (
            kibibytes * 1024 > WORN_SHARE * self.settings["memory_bytes"]
            or self.lowest_free_descriptor() > self.descriptors + WORN_DESCRIPTORS
        )

    def lowest_free_descriptor(self) -> int:
        descriptor = os.dup(self.result_fd)
        os.close(descriptor)
        return descriptor

    def _pass_on(self, number: int, frame: object) -> None:
        if self.child:
            os.kill(self.child, number)

    # ---- one call in a process of its own ---------------------------------------------------------------------------

    def _run_in_fork(self, call: Call) -> None:
        started = perf_counter()
        answers, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(answers)
            self._become_fork(write_end, call)
        self.child = child
        os.close(write_end)
        os.set_blocking(answers, False)
        try:
            found, fault = _frames_of(child, answers, call.width)
        finally:
            self.child = 0
            os.close(answers)
        if fault:
            empty = Frame(0, "crash", 0, 0.0, perf_counter() - started, b"", cut(fault))
            found = [empty] * call.width
        parts = [frame._replace(id=call.id + place, flags=0) for place, frame in enumerate(found)]
        self._send_frames(parts, LEFT_BEHIND if has_children() else 0)

    def _become_fork(self, write_end: int, call: Call) -> NoReturn:
        try:
            os.close(self.request_fd)
            os.close(self.result_fd)
            self.result_fd, self.is_fork, self.pid, self.child = write_end, True, os.getpid(), 0
            self.left = call.width
            self.enclose()
            self.run(call)
            os._exit(0)
        except BaseException:
            die()


def _frames_of(child: int, answers: int, count: int) -> tuple[list[Frame], str]:
    """What a fork sent, or why that is not `count` results. The fork is gone when this returns."""
    found: list[Frame] = []
    data, ended, broken = bytearray(), False, False
    watch = os.pidfd_open(child)
    poll = select.poll()
    poll.register(answers, select.POLLIN)
    poll.register(watch, select.POLLIN)
    while len(found) < count and not (ended or broken):
        ended = any(fd == watch for fd, _ in poll.poll())  # asked first, so that all it ever sent is there
        try:
            part = os.read(answers, 65536)  # as much as a pipe holds
        except BlockingIOError:
            continue
        data += part
        if not part and not ended:
            poll.unregister(answers)  # it closed its end and goes on
            poll.poll()
            ended = True
        try:
            while len(found) < count and (frame := unpack(data)):
                found.append(frame)
        except Broken:
            broken = True
    os.close(watch)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if len(found) == count:
        return found, ""
    if broken:
        return [], "the process broke the protocol: something else wrote to its result channel"
    return [], ending(os.waitstatus_to_exitcode(status))


def die() -> NoReturn:
    """Of the exception that is being handled; no fork may come back to where it was made."""
    try:
        os.write(STDERR, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(1)


def has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
