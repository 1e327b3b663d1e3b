"""Code tests: programs right and wrong, and programs that try to look right. They run in a pool, as in a job."""

import json
from typing import Any

from rewardsmith.rewards.library import code_tests, with_settings
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.wire import RevisionFunction

DOUBLE = [{"input": "2\n", "output": "4\n"}, {"input": "5", "output": "10"}]
SQUARE = ["assert square(3) == 9", "assert square(-2) == 4"]
GOOD = "print(int(input()) * 2)"


def scored(*cases: tuple[str, Any], **settings: Any) -> list[Score]:
    """The scores of (completion, tests), each by a call of its own."""
    source = with_settings(code_tests, **settings).source
    function = RevisionFunction(name="code", source=source, source_sha256="")
    with RewardPool([function], workers=1) as pool:
        groups = [Group("", {"tests": tests}, [completion]) for completion, tests in cases]
        return [scores[0]["code"] for scores in pool.score(groups)]


def values(*cases: tuple[str, Any], **settings: Any) -> list[float | None]:
    found = scored(*cases, **settings)
    assert {score.outcome for score in found} == {"ok"}, found
    return [score.value for score in found]


def test_programs_that_read_and_print() -> None:
    words = "for word in input().split():\n    print(word)"
    assert values(
        (GOOD, DOUBLE),
        (f"Here:\n```python\n{GOOD}\n```\nIt doubles.", DOUBLE),
        (f"```python\nprint(1)\n```\nNo:\n```py\n{GOOD}\n```", DOUBLE),
        (GOOD, json.dumps(DOUBLE)),
        (GOOD, {"inputs": ["2", "5"], "outputs": ["4", "10"]}),
        (f"{GOOD[:-1]}, '  ')\nprint()", DOUBLE),
        (words, [{"input": ["a b"], "output": ["a", "b"]}]),
        ("print(int(input()) + 2)", DOUBLE),
    ) == [1.0] * 7 + [0.0]


def test_functions_that_are_asserted() -> None:
    assert values(
        ("def square(x):\n    return x * x", SQUARE),
        ("def even(x):\n    return x % 2 == 0", ["assert even(4)", "assert not even(3)"]),
        ("def half(x):\n    return x / 2", ["assert abs(half(3) - 1.5) < 1e-9", "assert half(2) == 2 / 2"]),
        ("def pairs(x):\n    return {1: (x, 'a')}", ["assert pairs(2) == {1: (2, 'a')}"]),
        ("def square(x):\n    return 9", SQUARE),
        ("def even(x):\n    return True", ["assert even(4)", "assert not even(3)"]),
    ) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_shares() -> None:
    cases = [
        ("def square(x):\n    return 9", SQUARE),
        ("print(int(input()) + 2)", DOUBLE),
        ("x", DOUBLE),
        (GOOD, DOUBLE),
    ]
    assert values(*cases, partial=True) == [0.5, 0.5, 0.0, 1.0]


PRETENDERS = [
    "",
    "def square(x):\n    pass",
    "def square(x):\n    raise ValueError",
    "def square(x)\n    return x * x",
    "raise SystemExit(0)",
    "import os; os._exit(0)",
    "import sys; sys.exit()",
    "def square(x):\n    import os\n    os._exit(0)",
    "print('True'); print('9'); print('4'); raise SystemExit",
    "class X:\n    def __eq__(self, x): return True\n    def __repr__(self): return 'True'\ndef square(x): return X()",
    "import builtins\nbuiltins.repr = lambda value: 'True'\ndef square(x): return None",
    "import builtins\nbuiltins.print = lambda *a: None\ndef square(x): return 9",
    "def square(x): return '9'",
    '"""',
    "x = (",
    "def square(x):\n    while True: pass",
    "def square(x): return [0] * 10**10",
    "def square(x): return 'x' * 10**7",
]


def test_programs_that_are_wrong_or_pretend() -> None:
    cases = [(program, SQUARE) for program in PRETENDERS]
    assert dict(zip(PRETENDERS, values(*cases, seconds=0.5), strict=True)) == dict.fromkeys(PRETENDERS, 0.0)


def test_programs_that_print_the_wrong_thing_or_do_not_end_well() -> None:
    programs = [
        "print(4); raise SystemExit(3)",
        "print('4\\n10')",
        "while True: print(4)",
        "import time; time.sleep(9)",
        "exit()",
    ]
    assert values(*[(program, DOUBLE) for program in programs], seconds=0.5) == [0.0] * len(programs)


def test_the_expected_value_never_reaches_the_program_s_process() -> None:
    search = """
import sys
seen, frame = "", sys._getframe()
while frame:
    seen += repr(frame.f_locals) + repr(frame.f_code.co_consts)
    frame = frame.f_back
start = seen.find("".join(["S3C", "R3T-"]))
def answer():
    return seen[start:start + 11] if start >= 0 else "not there"
print(answer())
"""
    found = values(
        (search, [{"input": "", "output": "S3CR3T-1234"}]),
        (search, ["assert answer() == 'S3CR3T-1234'"]),
        (search, [{"input": "", "output": "not there"}]),
    )
    assert found == [0.0, 0.0, 1.0]


def test_the_first_failure_is_printed() -> None:
    asserts = [*SQUARE, "assert square(1) == 1", "assert square(0) == 0"]
    first, second, third = scored(
        ("def square(x):\n    return x + 6", asserts),
        ("def square(x):\n    return nothing", SQUARE),
        ("print(1)", DOUBLE),
    )
    assert first.prints == "test 3 of 4: square(1) is 7\n"
    assert second.prints.startswith("test 1 of 2: ended with 1 before the test was over: NameError: name 'nothing'")
    assert third.prints == "test 1 of 2: printed '1\\n'\n"


def test_a_row_without_tests_is_an_error_and_no_zero() -> None:
    found = scored(
        *[("x = 1", tests) for tests in ([], "[]", {"fn_name": "f", "inputs": [], "outputs": []}, 7, ["x == 1"])]
    )
    assert {score.outcome for score in found} == {"exception"}
    for score in found[:4]:
        assert "column 'tests' holds no tests" in (score.error or "")
    assert "is no assert statement: x == 1" in (found[4].error or "")
