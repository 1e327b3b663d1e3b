"""Reward functions that misbehave: each gets its outcome, and the calls around it their right values.

The functions here travel as text like any other. They return the number in the completion, unless it says "bad".
"""

import sys
import textwrap
from collections.abc import Callable

import pytest
from reward_pools import leaves, named, pool

from rewardsmith.rewards import source
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rewards.pool import Group
from rewardsmith.rewards.sandbox.limits import Limits

pytestmark = pytest.mark.usefixtures("every_tier")

LIMITS = Limits(call_seconds=0.25)
COMPLETIONS = [*map(str, range(8)), "bad", *map(str, range(8, 16))]


def score_with_neighbours(body: str, limits: Limits = LIMITS) -> Score:
    """Score 16 good completions and a bad one in the middle; check the good ones and return the other's score."""
    text = (
        "def reward(prompt, completion, example):\n"
        "    if completion == 'bad':\n"
        f"{textwrap.indent(textwrap.dedent(body).strip(), ' ' * 8)}\n"
        "    return float(completion)\n"
    )
    assert source.check(text) == []
    with pool([named("reward", text)], workers=1, limits=limits) as one:
        (scores,) = one.score([Group("p", {}, COMPLETIONS)])
    found = {completion: score["reward"] for completion, score in zip(COMPLETIONS, scores, strict=True)}
    bad = found.pop("bad")
    assert {completion: (score.outcome, score.value) for completion, score in found.items()} == {
        str(number): ("ok", float(number)) for number in range(16)
    }
    return bad


RAISES = {
    "missing key": ("return example['answer']", "return example['answer']\n"),
    "exit": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "generator exit": ("raise GeneratorExit", "GeneratorExit"),
    "long message": ("raise ValueError('x' * 5_000_000)", "bytes cut]"),
    "text of the error raises": (
        """
        class Silent(Exception):
            def __str__(self):
                raise KeyError
        raise Silent
        """,
        "Silent",
    ),
    "endless recursion": (
        """
        def again():
            return again()
        again()
        """,
        "RecursionError",
    ),
    "reads the keyboard": ("input()", "EOFError"),
    "chained": (
        """
        try:
            1 / 0
        except ZeroDivisionError as error:
            raise RuntimeError("second") from error
        """,
        "direct cause",
    ),
}


@pytest.mark.parametrize(("body", "says"), RAISES.values(), ids=RAISES)
def test_exception(body: str, says: str) -> None:
    bad = score_with_neighbours(body)
    assert (bad.outcome, bad.value) == ("exception", 0.0)
    assert says in bad.error
    assert "<reward function reward>" in bad.error
    assert "inside/" not in bad.error
    assert len(bad.error) < 4300


NO_NUMBERS = {
    "nothing": ("return None", "None (is a return missing?)"),
    "falls off the end": ("return", "None"),
    "text": ("return '1.0'", "a str"),
    "dict": ("return {'score': 1.0}", "a dict"),
    "list": ("return [1.0]", "a list"),
    "complex": ("return 1j", "a complex"),
    "nan": ("return float('nan')", "nan (float)"),
    "infinite": ("return -float('inf')", "-inf (float)"),
    "huge": ("return 10 ** 400", "an int too large"),
    "decimal": ("import decimal; return decimal.Decimal('1.5')", "a Decimal"),
    "coroutine": (
        """
        async def later():
            return 1.0
        return later()
        """,
        "a coroutine",
    ),
    "item raises": (
        """
        class Number:
            def item(self):
                raise ValueError("no item")
        return Number()
        """,
        "a Number that is not one number (no item)",
    ),
    "two elements": ("import numpy; return numpy.ones(2)", "a ndarray that is not one number"),
    "float too large": ("return -1.5e308", "returned -1.5e+308, too large to compare; return a number from -1e+12"),
    "int too large": ("return 10**200", "returned 1e+200, too large to compare"),
    "int beyond any float": ("return 10**400", "returned an int too large to compare"),
    "half precision overflow": ("import numpy; return numpy.float16(70000)", "inf (float16)"),
}


@pytest.mark.parametrize(("body", "says"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_not_a_number(body: str, says: str) -> None:
    bad = score_with_neighbours(body)
    assert (bad.outcome, bad.value) == ("not_a_number", 0.0)
    assert says in bad.error


HANGS = {
    "loop": "while True: pass",
    "loop that swallows everything": """
        while True:
            try:
                while True: pass
            except BaseException: pass
        """,
    "sleep": "import time; time.sleep(1e6)",
    "regular expression": r"import re; re.match(r'(a+)+$', 'a' * 40 + 'b')",
    "huge power": "return 10 ** 10 ** 9",
    "lock taken twice": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "text of the error loops": """
        class Endless(Exception):
            def __str__(self):
                while True: pass
        raise Endless
        """,
}


@pytest.mark.parametrize("body", HANGS.values(), ids=HANGS)
def test_timeout_says_where(body: str) -> None:
    bad = score_with_neighbours(body)
    assert (bad.outcome, bad.value) == ("timeout", 0.0)
    assert bad.error.startswith("no result after 0.25 s")
    assert 'File "<reward function reward>", line' in bad.error
    assert "inside/" not in bad.error


DEAF = {
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "signals blocked": """
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        while True: pass
        """,
    "fork bomb of two, waiting": "import os; os.fork(); os.fork(); import time; time.sleep(1e6)",
}


@pytest.mark.parametrize("body", DEAF.values(), ids=DEAF)
def test_timeout_of_what_does_not_answer(body: str) -> None:
    assert score_with_neighbours(body).outcome == "timeout"


DEATHS = {
    "exit code 0": ("import os; os._exit(0)", "exit code 0"),
    "exit code 3": ("import os; os._exit(3)", "exit code 3"),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    "unnamed signal": ("import os; os.kill(os.getpid(), 40)", "ended by signal 40"),
    "group killed": ("import os, signal; os.killpg(0, signal.SIGKILL)", "SIGKILL"),
    "segfault": ("import ctypes; ctypes.string_at(0)", "SIGSEGV\nFatal Python error: Segmentation fault"),
    "abort": ("import os; os.abort()", "SIGABRT"),
    "descriptors closed": ("import os; os.closerange(0, 256)", "exit code 1"),
    "result channel closed, then asleep": (
        """
        import os, time
        os.closerange(3, 256)
        time.sleep(1e6)
        """,
        "closed its channel",
    ),
    "exit with a fork that keeps the channel": (
        """
        import os, time
        if os.fork() == 0:
            time.sleep(1e6)
        os._exit(5)
        """,
        "exit code 5",
    ),
    "garbage on every descriptor": (
        """
        import os
        for fd in range(3, 30):
            try:
                os.write(fd, b"x" * 100)
            except OSError:
                pass
        """,
        "broke the protocol",
    ),
    "forged result on every descriptor": (
        """
        import os, struct
        for fd in range(3, 30):
            for number in range(100):
                try:
                    os.write(fd, struct.pack("<QBBddII", number, 0, 0, 1.0, 0.0, 0, 0))
                except OSError:
                    pass
        return 1.0
        """,
        "broke the protocol",
    ),
    "half a result, then exit": (
        """
        import os
        for fd in range(3, 30):
            try:
                os.write(fd, b"x")
            except OSError:
                pass
        os._exit(1)
        """,
        "exit code 1",
    ),
}

if sys.version_info < (3, 12):  # later versions turn this into a RecursionError
    DEATHS["C stack"] = (
        """
        import sys
        sys.setrecursionlimit(10 ** 8)
        class Nested:
            def __repr__(self):
                return repr([self])
        repr(Nested())
        """,
        "SIGSEGV",
    )


@pytest.mark.parametrize(("body", "says"), DEATHS.values(), ids=DEATHS)
def test_crash(body: str, says: str) -> None:
    bad = score_with_neighbours(body)
    assert (bad.outcome, bad.value) == ("crash", 0.0)
    assert says in bad.error


HOGS = {
    "one block": "bytearray(2 ** 40)",
    "piece by piece": "pieces = [bytearray(2 ** 24) for _ in iter(int, 1)]",
    "list": "import itertools; list(itertools.repeat([], 10 ** 9))",
}


@pytest.mark.parametrize("body", HOGS.values(), ids=HOGS)
def test_out_of_memory(body: str) -> None:
    bad = score_with_neighbours(body, Limits(memory_bytes=200 * 2**20))
    assert (bad.outcome, bad.value) == ("out_of_memory", 0.0)
    assert "MemoryError" in bad.error


FLOODS = {
    "print": "print('x' * 2_000_000)",
    "endless print": "while True: print('x' * 1000)",
    "endless print that catches exceptions": """
        while True:
            try:
                print('x' * 10_000)
            except Exception: pass
        """,
    "stderr": "import sys; sys.stderr.write('x' * 2_000_000); return 1.0",
    "bytes": "import sys; sys.stdout.buffer.write(b'x' * 2_000_000)",
    "past the capture": """
        import os
        while True: os.write(1, b'x' * 60_000)
        """,
    "another program": "import subprocess; subprocess.run(['yes'])",
}


@pytest.mark.parametrize("body", FLOODS.values(), ids=FLOODS)
def test_output_limit(body: str) -> None:
    bad = score_with_neighbours(body)
    assert (bad.outcome, bad.value) == ("output_limit", 0.0)
    assert bad.error == "printed more than 1048576 bytes"
    assert len(bad.prints) < 5000


TRACES = {
    "spinning thread": """
        import threading
        def spin():
            while True: pass
        threading.Thread(target=spin, daemon=True).start()
        return 1.0
        """,
    "sleeping fork": """
        import os, time
        if os.fork() == 0:
            time.sleep(1e6)
        return 1.0
        """,
    "program left running": "import subprocess; subprocess.Popen(['sleep', '1000']); return 1.0",
}


@pytest.mark.parametrize("body", TRACES.values(), ids=TRACES)
def test_what_a_call_leaves_running_is_ended(body: str) -> None:
    bad = score_with_neighbours(body)
    assert (bad.outcome, bad.value) == ("ok", 1.0)
    assert "left a thread or a process running" in bad.prints


def test_a_daemon_ends_with_the_executor_that_it_was_started_in(wait_until: Callable[..., None]) -> None:
    text = """
        def reward(prompt, completion, example):
            import os, time
            if os.fork() == 0:
                try:
                    os.setsid()
                except OSError:
                    pass
                if os.fork() == 0:
                    time.sleep(1e6)
                os._exit(0)
            os.wait()
            return 1.0
        """
    with pool([named("reward", text)], workers=1, runtime={"mode": "warm"}) as one:
        assert one.score([Group("p", {}, ["c"])])[0][0]["reward"].value == 1.0
        wait_until(lambda: len(leaves()) <= 1)


HARMLESS = {
    "fork that returns": "import os; os.fork(); return 1.0",
    "alarm left set": "import signal; signal.setitimer(signal.ITIMER_REAL, 0.01); return 1.0",
    "trace function": """
        import sys
        def trace(frame, event, argument):
            if frame.f_code.co_name == "reward":
                raise ValueError
        sys.settrace(trace)
        return 1.0
        """,
    "tiny recursion limit": "import sys; sys.setrecursionlimit(60); return 1.0",
    "streams closed": "import sys; sys.stdout.close(); sys.stderr = None; return 1.0",
    "other folder": "import os; os.chdir('/'); return 1.0",
    "writes to descriptor 1": "import os; os.write(1, b'hello'); return 1.0",
    "lying float": """
        class Liar(float):
            def __float__(self):
                return 99.0
        return Liar(1.0)
        """,
    "example changed": "example['bad'] = 1; return 1.0",
}


@pytest.mark.parametrize("body", HARMLESS.values(), ids=HARMLESS)
def test_a_call_does_not_reach_the_next_one(body: str) -> None:
    bad = score_with_neighbours(body)
    assert (bad.outcome, bad.value) == ("ok", 1.0)


def test_many_bad_calls_among_several_workers() -> None:
    text = textwrap.dedent("""
        def reward(prompt, completion, example):
            import os, time
            number = int(completion)
            if number % 20 == 3:
                os._exit(1)
            if number % 20 == 7:
                time.sleep(1e6)
            return float(number)
        """)
    with pool([named("reward", text)], workers=2, limits=Limits(call_seconds=0.2)) as two:
        groups = [Group("p", {}, [str(10 * g + c) for c in range(10)]) for g in range(10)]
        scores = [completion["reward"] for group in two.score(groups) for completion in group]
    expected = {3: "crash", 7: "timeout"}
    assert [score.outcome for score in scores] == [expected.get(number % 20, "ok") for number in range(100)]
    assert [score.value for score in scores if score.outcome == "ok"] == [
        float(number) for number in range(100) if number % 20 not in expected
    ]
