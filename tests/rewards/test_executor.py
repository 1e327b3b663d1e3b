"""One sandbox and its executors, without a pool: what they say, how they end, and that nothing else is believed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import reward_pools

from rewardsmith.rewards.calls import Call, Chunk, Group, Prompt, Result
from rewardsmith.rewards.executor import Executor
from rewardsmith.rewards.sandbox.limits import Limits
from rewardsmith.rewards.sandbox.tiers import Tier
from rewardsmith.rewards.sandbox.zygote import Ended, Event, Failed, Forked, Loaded, Ready, Sandbox, Source

Wait = Callable[[Callable[[], object]], None]
pytestmark = pytest.mark.usefixtures("every_tier")
LENGTH = "def f(prompt, completion, example): return len(completion)"


@contextmanager
def started(*texts: str) -> Iterator[tuple[Sandbox, list[Event]]]:
    """A sandbox and what it said until it was ready or broken."""
    sources = [Source(f"f{number}", text, False) for number, text in enumerate(texts)]
    sandbox = Sandbox(sources, reward_pools.tier(), Limits(), [], {})
    try:
        heard = hear(sandbox, lambda said: sandbox.ready or sandbox.broken is not None)
        yield sandbox, heard
    finally:
        sandbox.stop()


def hear(sandbox: Sandbox, enough: Callable[[list[Event]], bool]) -> list[Event]:
    heard: list[Event] = []
    give_up = time.monotonic() + 20
    while not enough(heard):
        assert time.monotonic() < give_up, heard
        sandbox.flush()
        heard += sandbox.receive()
    return heard


def chunk(*texts: str, concurrency: int = 0) -> Chunk:
    prompt = Prompt(Group("p", {}, texts))
    return Chunk([Call(prompt, text, 0, [(0, place, 0)]) for place, text in enumerate(texts)], concurrency=concurrency)


def answers(executor: Executor, count: int) -> list[tuple[str, Result]]:
    found: list[tuple[str, Result]] = []
    give_up = time.monotonic() + 20
    while len(found) < count and not executor.broken:
        assert time.monotonic() < give_up, found
        executor.flush()
        found += [(str(call.texts), result) for _, call, _, result in executor.receive()]
    return found


def test_a_sandbox_says_how_it_comes_up() -> None:
    with started(LENGTH, LENGTH) as (sandbox, heard):
        assert heard[1:] == [Loaded(0), Loaded(1), Ready(1)]
        assert sandbox.hardened and sandbox.ready and sandbox.broken is None


def test_what_cannot_be_loaded_is_named() -> None:
    with started(LENGTH, "def f(prompt, completion, example): import no_such_module") as (_, heard):
        failed = heard[-1]
        assert isinstance(failed, Failed) and (failed.index, failed.outcome) == (1, "exception")
        assert "No module named 'no_such_module'" in failed.error
        assert "inside/" not in failed.error


def test_executors_answer_and_end_when_they_are_killed() -> None:
    with started(LENGTH) as (sandbox, _):
        executors = [Executor(sandbox, number) for number in (5, 6)]
        heard = hear(sandbox, lambda said: len(said) == 2)
        assert heard == [Forked(5), Forked(6)]
        for executor in executors:
            executor.give(chunk("a", "bb"))
            executor.give(chunk("ccc"))
            assert [(text, result.value) for text, result in answers(executor, 3)] == [("a", 1), ("bb", 2), ("ccc", 3)]
        sandbox.kill(5)
        assert hear(sandbox, lambda said: bool(said)) == [Ended(5, -9, "")]
        assert sandbox.dying == {}
        executors[1].give(chunk("dddd"))
        assert answers(executors[1], 1)[0][1].value == 4
        for executor in executors:
            executor.close()


SENDS = """
def f(prompt, completion, example):
    import os, struct
    def write(data):
        for fd in range(3, 64):
            try:
                os.write(fd, data)
            except OSError:
                pass
    lawful = struct.pack("<QBBddII", {number}, 0, 0, 1.0, 0.0, 0, 0)
    {sends}
    return 0.5
"""
STRAY = {
    "garbage": "write(b'x' * 200)",
    "a result with a made-up id": "write(lawful)",
    "half a result": "write(lawful[:9])",
    "a result too many": "write(lawful) if completion == 'last' else None",
}


@pytest.mark.parametrize("sends", STRAY.values(), ids=STRAY)
def test_a_frame_that_is_not_due_breaks_the_executor(sends: str) -> None:
    with started(SENDS.format(number=1, sends=sends)) as (sandbox, _):
        executor = Executor(sandbox, 0)
        executor.give(chunk("first", "last"))
        found = answers(executor, 3)
        assert executor.broken == "violated"
        assert all(result.value == 0.5 for _, result in found)
        executor.close()


def test_a_frame_that_comes_later_breaks_the_executor(wait_until: Wait) -> None:
    text = """
def f(prompt, completion, example):
    import os, time
    if os.fork() == 0:
        time.sleep(0.1)
        for fd in range(3, 64):
            try:
                os.write(fd, b"late" * 20)
            except OSError:
                pass
        os._exit(0)
    return 1.0
"""
    with started(text) as (sandbox, _):
        executor = Executor(sandbox, 0)
        executor.give(chunk("a"))
        ((_, result),) = answers(executor, 1)
        assert result.left_behind
        executor.chunks.clear()
        wait_until(lambda: list(executor.receive()) == [] and executor.broken == "violated")
        executor.close()


MESSAGES = {
    "garbage": b"garbage",
    "no such message": b'{"hello": 1}',
    "a number that is none": b'{"ended": -1, "exit": 0, "signal": null, "error": ""}',
    "another type": b'{"ready": true, "threads": "many"}',
    "nested without end": b"[" * 50_000,
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_a_message_that_is_none_of_the_protocol_ends_the_sandbox(message: bytes) -> None:
    # A default argument runs in the first process, which has the control socket.
    text = f"""def f(prompt, completion, example, sent=[
        one.send({message!r})
        for one in __import__("gc").get_objects() if type(one) is __import__("socket").socket
    ]): return 1"""
    with started(text) as (sandbox, _):
        assert sandbox.broken == "the sandbox broke the protocol"


def test_files_of_a_sandbox_go_with_it(every_tier: Tier) -> None:
    text = 'def f(prompt, completion, example): open("kept", "w").write(completion); return 1'
    with started(text) as (sandbox, _):
        executor = Executor(sandbox, 0)
        executor.give(chunk("a"))
        assert answers(executor, 1)[0][1].outcome == "ok"
        executor.close()
        folder = sandbox._scratch
        assert (folder is None) == (every_tier >= Tier.S2)
        assert folder is None or (folder / "kept").read_text() == "a"
    assert folder is None or not Path(folder).exists()


def test_a_sandbox_that_was_never_heard_is_stopped_too() -> None:
    sandbox = Sandbox([Source("f", LENGTH, False)], reward_pools.tier(), Limits(), [], {})
    sandbox.stop()
    sandbox.stop()
    assert not reward_pools.processes()
