"""`run_python` inside a reward function: how programs end, what they are kept from, and that they can forge nothing."""

import json
import textwrap
from typing import Any

import pytest
from reward_pools import named, pool

from rewardsmith.rewards.grants import Grants
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rewards.pool import Group
from rewardsmith.rewards.sandbox.limits import Limits
from rewardsmith.rewards.sandbox.tiers import Tier

pytestmark = pytest.mark.usefixtures("every_tier")

RUNS = """
    def f(prompt, completion, example):
        import json
        from reward_tools import run_python
        secret = "a secret of the row"
        ran = run_python(completion, **example.get("settings", {}))
        print(json.dumps([ran.out, ran.err, ran.rc, ran.timeout]))
        return 0.25
    """


def run(code: str, mode: str = "auto", **settings: Any) -> tuple[str, str, int, bool]:
    score = scored(code, mode, **settings)
    assert (score.outcome, score.value) == ("ok", 0.25), score
    return tuple(json.loads(score.prints))


def scored(code: str, mode: str = "auto", **settings: Any) -> Score:
    with pool([named("f", RUNS)], workers=1, runtime={"mode": mode}) as scoring:
        good = "print(1 + 1)"
        example = {"settings": settings, "answer": "the hidden answer"}
        first, bad, last = (s["f"] for s in scoring.score([Group("p", example, [good, code, good])])[0])
    for score in (first, last):
        assert (score.value, json.loads(score.prints)) == (0.25, ["2\n", "", 0, False])
    return bad


@pytest.mark.parametrize("mode", ["warm", "call"])
def test_programs_print_read_and_end(mode: str) -> None:
    code = "import sys\nprint(sys.stdin.read().upper())\nprint('to err', file=sys.stderr)\nsys.exit(3)"
    assert run(code, mode, stdin="hé\n") == ("HÉ\n\n", "to err\n", 3, False)


ENDS = {
    "ends": ("x = 1", "", "", 0),
    "raises": ("def f():\n    return 1 / 0\nf()", "", "ZeroDivisionError", 1),
    "does not parse": ("def", "", "SyntaxError", 1),
    "exits with text": ("import sys\nprint('so far')\nsys.exit('why')", "so far\n", "why", 1),
    "os._exit": ("import os\nos._exit(9)", "", "", 9),
    "is killed": ("import os\nos.kill(os.getpid(), 11)", "", "", -11),
    "interrupts": ("raise KeyboardInterrupt", "", "KeyboardInterrupt", 1),
    "is main": ("if __name__ == '__main__':\n    print('main')", "main\n", "", 0),
    "reads nothing": ("print(repr(input() if False else ''))", "''\n", "", 0),
    "prints a surrogate": ("print(chr(0xd800))", "\\ud800\n", "", 0),
    "holds a surrogate": ("print('\ud800')", "", "surrogates not allowed", 1),
    "closes its output": ("import sys\nprint('said')\nsys.stdout.flush()\nsys.stdout = None", "said\n", "", 0),
}


@pytest.mark.parametrize(("code", "out", "err", "rc"), ENDS.values(), ids=ENDS)
def test_how_programs_end(code: str, out: str, err: str, rc: int) -> None:
    found = run(code)
    assert (found[0], found[2], found[3]) == (out, rc, False), found
    assert err in found[1]
    assert "inside/" not in found[1]


def test_a_program_that_does_not_end() -> None:
    out, _, rc, timeout = run("print('begun', flush=True)\nwhile True: pass", seconds=0.3)
    assert (out, rc, timeout) == ("begun\n", -9, True)


def test_a_program_that_swallows_everything() -> None:
    code = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nimport time\ntime.sleep(1e6)"
    assert run(code, seconds=0.3)[2:] == (-9, True)


def value_of(body: str, completion: str) -> float | None:
    """What a function returns whose body has `run_python`."""
    body = textwrap.indent(f"from reward_tools import run_python\n{body}", "    ")
    text = f"def f(prompt, completion, example):\n{body}"
    with pool([named("f", text)], workers=1, limits=Limits(call_seconds=20)) as scoring:
        score = scoring.score([Group("p", {}, [completion])])[0][0]["f"]
    assert score.outcome == "ok", score
    return score.value


def test_a_program_that_floods() -> None:
    body = "ran = run_python(completion, output_bytes=10_000)\nreturn (len(ran.out), *ran[2:]) == (10_000, -9, False)"
    assert value_of(body, "while True: print('x' * 1000)") == 1.0


def test_much_input_and_output() -> None:
    body = """
lines = [str(number) for number in range(30_000)]
ran = run_python(completion, stdin="\\n".join(lines), output_bytes=2**20, seconds=10)
return ran == ("".join(line[::-1] + "\\n" for line in lines), "", 0, False)
"""
    assert value_of(body, "import sys\nfor line in sys.stdin:\n    print(line.strip()[::-1])") == 1.0


@pytest.mark.parametrize("code", ["bytearray(2 ** 30)", "x = ['y' * 10 ** 6 + str(n) for n in range(10 ** 9)]"])
def test_memory_is_bounded(code: str) -> None:
    _, err, rc, _ = run(code, memory_bytes=64 * 2**20)
    assert rc == 1 and "MemoryError" in err


REFUSED = {
    "write a file": "import tempfile\nopen(tempfile.gettempdir() + '/x', 'w').write('x')",
    "start a process": "import os\nos.fork() or os._exit(0)",
    "start a program": "import subprocess\nsubprocess.run(['true'], check=True)",
    "signal its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)",
    "start programs itself": "from reward_tools import run_python\nrun_python('1')",
}


@pytest.mark.parametrize("code", REFUSED.values(), ids=REFUSED)
def test_what_programs_may_not_do(code: str, every_tier: Tier) -> None:
    if every_tier == Tier.S0:
        pytest.skip("S0 promises none of it")
    _, err, rc, timeout = run(code)
    assert (rc, timeout) == (1, False), err


def test_a_program_has_no_descriptor_no_variable_and_no_row() -> None:
    code = """
import gc, os, sys
def is_open(fd):
    try:
        os.fstat(fd)
        return True
    except OSError:
        return False
texts = set()
for thing in gc.get_objects():
    if isinstance(thing, dict):
        texts.update(value for value in thing.values() if isinstance(value, str))
    elif isinstance(thing, (list, tuple)):
        texts.update(value for value in thing if isinstance(value, str))
frame = sys._getframe()
while frame:
    texts.update(value for value in frame.f_locals.values() if isinstance(value, str))
    frame = frame.f_back
print([fd for fd in range(256) if is_open(fd)], dict(os.environ), " ".join(["the", "hidden", "answer"]) in texts)
key = "-".join(["judge", "key", "7"])
print(any(key in text for text in texts))
try:
    print(key.encode() in open("/proc/self/environ", "rb").read())
except OSError:
    print(False)
"""
    for mode in ("warm", "call"):
        settings = {"workers": 1, "runtime": {"mode": mode}, "grants": Grants({"KEY": "judge-key-7"})}
        with pool([named("f", RUNS)], **settings) as scoring:
            example = {"answer": "the hidden answer"}
            scores = scoring.score([Group("p", example, ["print(1)", code])])[0]
        assert json.loads(scores[1]["f"].prints) == ["[0, 1, 2] {} False\nFalse\nFalse\n", "", 0, False]


def test_a_program_cannot_set_the_score(every_tier: Tier) -> None:
    code = """
import gc, os, struct
for fd in range(0, 256):
    for number in range(8):
        try:
            os.write(fd, struct.pack("<QBBddII", number, 0, 0, 1.0, 0.0, 0, 0))
        except OSError:
            pass
if {kill}:
    for pid in (os.getppid(), -1):
        try:
            os.kill(pid, 9)
        except OSError:
            pass
"""
    out = run(code.replace("{kill}", str(every_tier > Tier.S0)))
    assert out[2:] == (0, False)


def test_a_late_call_takes_its_program_along() -> None:
    text = """
        def f(prompt, completion, example):
            from reward_tools import run_python
            return run_python(completion, seconds=60).rc
        """
    with pool([named("f", text)], workers=1, runtime={"call_seconds": 0.3}) as scoring:
        hang, good = (s["f"] for s in scoring.score([Group("p", {}, ["while True: pass", "pass"])])[0])
        assert (hang.outcome, good.value) == ("timeout", 0.0)
        assert "run_python" in (hang.error or "")
