"""Calls of `async def` functions, several at a time in one event loop. Standard library only.

Each call has its own deadline here: outside, nobody can tell which of them is late. A call that does not let go of the
loop, or that cannot be canceled, is left to the pool and its SIGKILL. The loop lives as long as the executor, so that a
client that a function keeps stays usable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .frames import LEFT_BEHIND
from .judge import Verdict, judge_error
from .worker import has_children

if TYPE_CHECKING:
    from .worker import Call, Executor

CANCEL_SECONDS = 0.05  # that a call has to end when it is told to

_loop: asyncio.AbstractEventLoop | None = None


def run(executor: Executor, calls: list[Call], concurrency: int) -> None:
    """All `calls`, at most `concurrency` at a time; results are sent as they come."""
    global _loop
    if _loop is None:
        _loop = asyncio.new_event_loop()
        executor.descriptors = executor.lowest_free_descriptor()
    executor.prints.begin()
    waiting = iter(calls)
    lanes = [_lane(executor, waiting) for _ in range(min(concurrency, len(calls)))]

    async def side_by_side() -> None:
        await asyncio.gather(*lanes)

    _loop.run_until_complete(side_by_side())
    executor.put_back()


async def _lane(executor: Executor, waiting: Iterator[Call]) -> None:
    for call in waiting:
        # A task has a context of its own, and so has what it prints.
        await asyncio.create_task(_one(executor, call))


async def _one(executor: Executor, call: Call) -> None:
    capture = executor.prints.begin_in_context()
    started = perf_counter()
    seconds = executor.settings["call_seconds"]
    flags = 0
    running: list[Any] = []
    task = asyncio.create_task(_verdicts(call, running))
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if done:
        verdicts = task.result()
    else:
        fault = f"no result after {seconds:g} s\n{_where(running)}".strip()
        verdicts = [("timeout", 0.0, fault)] * call.width
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_SECONDS)
        flags = 0 if task.done() else LEFT_BEHIND
    if executor.left == call.width and has_children():  # the last one; before, they may belong to another call
        flags = LEFT_BEHIND
    executor.send(call, verdicts, perf_counter() - started, capture, flags)


async def _verdicts(call: Call, running: list[Any]) -> list[Verdict]:
    try:
        running.append(call.start())
        return call.judge(await running[0])
    except BaseException as error:  # also SystemExit, which would end the loop and with it the other calls
        return [judge_error(error)] * call.width


def _where(running: list[Any]) -> str:
    """The stack of a coroutine that waits, outermost frame first, as far as it is written in Python."""
    lines = []
    waiting: Any = running[0] if running else None
    while (frame := getattr(waiting, "cr_frame", None)) is not None:
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}')
        waiting = waiting.cr_await
    return "\n".join(lines)
