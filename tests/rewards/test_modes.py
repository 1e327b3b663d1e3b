"""How functions are run: modes, recycling, the canary, several calls in one event loop, whole groups in one call."""

import textwrap
from itertools import pairwise

import psutil
import pytest
import reward_pools
from reward_pools import named, pool

from rewardsmith.errors import RewardPoolError
from rewardsmith.rewards import modes
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rewards.pool import Group
from rewardsmith.rewards.sandbox.limits import Limits
from rewardsmith.rewards.sandbox.tiers import Tier

pytestmark = pytest.mark.usefixtures("every_tier")

# How many calls this process has seen before this one.
COUNTS = """
    def f(prompt, completion, example):
        global calls
        try:
            calls += 1
        except NameError:
            calls = 0
        return calls
    """


def values(scores: list[list[dict[str, Score]]], name: str = "f") -> list[float | None]:
    return [score[name].value for group in scores for score in group]


# ---- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["warm", "chunk", "call"])
def test_how_long_a_process_is_used(mode: str) -> None:
    with pool([named("f", COUNTS)], workers=1, runtime={"mode": mode}) as scoring:
        found = values(scoring.score([Group("p", {}, ["c"] * 40)]))
    assert all(after in (0, before + 1) for before, after in pairwise(found)), found
    expected = {"warm": 0, "chunk": 3, "call": 40}[mode]  # fresh processes; chunks get smaller towards the end
    assert found.count(0) >= expected
    assert max(found) <= {"warm": 40, "chunk": 15, "call": 0}[mode]


RUNS_TEXT = {
    "eval": "return eval(completion)",
    "exec": "exec(completion)",
    "compile": "compile(completion, '', 'exec')",
    "subprocess": "import subprocess",
    "subprocess.run": "from subprocess import run",
    "importlib.util": "import importlib.util",
    "os.system": "import os; os.system(completion)",
    "sympify": "from sympy import sympify; return sympify(completion)",
}
DOES_NOT = {
    "re.compile": "import re; return re.compile(completion)",
    "literal_eval": "import ast; return ast.literal_eval(completion)",
    "model.eval": "model = example['model']; model.eval(); return 1",
    "run_python": "from reward_tools import run_python; return run_python(completion).rc",
}


@pytest.mark.parametrize("body", [*RUNS_TEXT.values(), *DOES_NOT.values()])
def test_what_can_run_text_of_the_model_is_forked(body: str) -> None:
    function = named("f", f"def f(prompt, completion, example):\n    {body}")
    assert modes.Way.of(function, "auto").mode == ("call" if body in RUNS_TEXT.values() else "warm")
    assert modes.Way.of(function, "warm").mode == "warm"


def test_only_what_runs_text_is_forked_and_that_is_said() -> None:
    evaluates = COUNTS.replace("return calls", "return calls + eval('0')").replace("def f", "def g")
    with pool([named("f", COUNTS), named("g", evaluates)], workers=1) as scoring:
        scores = scoring.score([Group("p", {}, ["c"] * 9)])
        (note,) = scoring.take_notes()
        assert scoring.take_notes() == []
    assert len(set(values(scores))) == 9
    assert values(scores, "g") == [0] * 9
    assert note.startswith("reward function 'g' uses eval")


FORGES = """
    def f(prompt, completion, example):
        import gc, os, struct, sys
        if completion == "forge":
            eval("1")
            for fd in range(3, 64):
                for number in range(4):
                    try:
                        os.write(fd, struct.pack("<QBBddII", number, 0, 0, 1.0, 0.0, 0, 0))
                    except OSError:
                        pass
        return 0.5
    """


def test_a_forked_call_can_forge_nothing_but_its_own_score() -> None:
    with pool([named("f", FORGES)], workers=1) as scoring:
        scores = scoring.score([Group("p", {}, ["a", "forge", "b", "c"])])[0]
    assert [score["f"].value for score in (scores[0], *scores[2:])] == [0.5, 0.5, 0.5]


POLLUTES = """
    def f(prompt, completion, example):
        {harmful}
        import json
        if completion == "evil":
            {evil}
            return 0.0
        return float(len(json.dumps(sorted(completion))))
    """
POLLUTIONS = {
    "builtins": "import builtins; builtins.sorted = lambda x: [7, 7, 7]",
    "a module": "json.dumps = lambda x: 'x' * 99",
    "its own code": "import sys; own = sys._getframe().f_globals['f']; own.__code__ = (lambda a, b, c: 99.0).__code__",
    "the judge": "import sys; sys.modules['inside.worker'].judge = lambda answer: ('ok', 99.0, '')",
}


@pytest.mark.parametrize("evil", POLLUTIONS.values(), ids=POLLUTIONS)
def test_a_call_that_changes_its_process_is_found_out(evil: str) -> None:
    text = POLLUTES.format(harmful="", evil=evil)
    with pool([named("f", text)], workers=1) as scoring:
        good = ["a", "ab", "abc"]
        right = [5.0, 10.0, 15.0]
        assert values(scoring.score([Group("p", {}, good)])) == right  # from here on an answer is known
        assert values(scoring.score([Group("p", {}, ["evil", *good])]))[1:] == right
        assert values(scoring.score([Group("p", {}, good)])) == right
        assert any("had changed the process of reward function 'f'" in note for note in scoring.take_notes())


@pytest.mark.parametrize("evil", POLLUTIONS.values(), ids=POLLUTIONS)
def test_a_forked_call_changes_no_process_but_its_own(evil: str) -> None:
    text = POLLUTES.format(harmful="eval('1')", evil=evil)
    with pool([named("f", text)], workers=1) as scoring:
        assert values(scoring.score([Group("p", {}, ["evil", "a", "evil", "ab"])]))[1::2] == [5.0, 10.0]
        assert not any("changed" in note for note in scoring.take_notes())


def test_a_function_without_certain_answers_has_no_canary() -> None:
    text = "def f(prompt, completion, example):\n    import random\n    return random.random()"
    with pool([named("f", text)], workers=2) as scoring:
        for _ in range(6):
            assert len(set(values(scoring.score([Group("p", {}, ["c"] * 8)])))) == 8
        assert scoring.take_notes() == []


# ---- recycling ------------------------------------------------------------------------------------------------------


def executors() -> set[int]:
    return {process.pid for process in reward_pools.leaves()}


def test_an_executor_is_replaced_after_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "WARM_CALLS", 50)
    with pool([named("f", COUNTS)], workers=1) as scoring:
        found = values(scoring.score([Group("p", {}, ["c"] * 1000)]))
    assert max(found) < 50 + 64 * 2 and sum(value <= 1 for value in found) >= 5


def test_an_executor_is_replaced_after_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    constant = "def f(prompt, completion, example):\n    return 1.0\n"
    with pool([named("f", constant)], workers=1) as scoring:
        for _ in range(3):  # until its answer is known for certain, which takes a fresh executor
            scoring.score([Group("p", {}, ["c"] * 5)])
        before = executors()
        scoring.score([Group("p", {}, ["c"])])
        assert executors() == before
        monkeypatch.setattr(modes, "WARM_SECONDS", 0.0)
        scoring.score([Group("p", {}, ["c"])])
        assert executors() != before


WEARS = {
    "memory": "keep = kept.append(bytearray(250_000_000))",
    "descriptors": "kept.extend(os.pipe() for _ in range(20))",
}


@pytest.mark.parametrize("wear", WEARS.values(), ids=WEARS)
def test_an_executor_that_has_grown_is_replaced(wear: str) -> None:
    text = f"""
        def f(prompt, completion, example):
            import os
            global kept
            try:
                kept
            except NameError:
                kept = []
            before = len(kept)
            {wear}
            return before
        """
    with pool([named("f", text)], workers=1, limits=Limits(memory_bytes=320 * 2**20)) as scoring:
        for _ in range(3):
            assert values(scoring.score([Group("p", {}, ["c"])])) == [0]


# ---- several calls in one event loop --------------------------------------------------------------------------------

SLEEPS = """
    async def f(prompt, completion, example):
        import asyncio
        print("begun", completion)
        await asyncio.sleep(float(completion))
        print("done", completion)
        return float(completion)
    """


def test_async_calls_run_side_by_side_and_keep_their_prints_apart() -> None:
    with pool([named("f", SLEEPS)], workers=1, runtime={"concurrency": 20}) as scoring:
        naps = [str(n / 100) for n in range(30, 10, -1)]
        scores = scoring.score([Group("p", {}, naps)])[0]
    assert [score["f"].value for score in scores] == [float(nap) for nap in naps]
    assert [score["f"].prints for score in scores] == [f"begun {nap}\ndone {nap}\n" for nap in naps]
    # One after the other, they would have begun when the one before was done.
    assert all(0 < score["f"].seconds < 2 for score in scores)


def test_no_more_async_calls_run_at_a_time_than_was_asked_for() -> None:
    text = """
        async def f(prompt, completion, example):
            import asyncio
            global running
            try:
                running += 1
            except NameError:
                running = 1
            now = running
            await asyncio.sleep(0.02)
            running -= 1
            return now
        """
    with pool([named("f", text)], workers=1, runtime={"concurrency": 3}) as scoring:
        assert max(values(scoring.score([Group("p", {}, ["c"] * 20)]))) == 3


ASYNC_FAULTS = {
    "raises": ("raise ValueError('no')", "exception", "ValueError: no"),
    "exits": ("import sys; sys.exit(3)", "exception", "SystemExit: 3"),
    "is late": ("await asyncio.sleep(1e6)", "timeout", "no result after 0.4 s"),
    "does not let itself be canceled": (
        """
        while True:
            try:
                await asyncio.sleep(1e6)
            except BaseException:
                pass
        """,
        "timeout",
        'File "<reward function f>", line',
    ),
    "blocks the loop": ("import time; time.sleep(1e6)", "timeout", 'File "<reward function f>", line'),
    "kills its process": ("import os; os._exit(7)", "crash", "exit code 7"),
    "floods": ("print('x' * 2_000_000)", "output_limit", "printed more than"),
    "returns text": ("return 'x'", "not_a_number", "a str"),
    "fills memory": ("bytearray(2 ** 40)", "out_of_memory", "MemoryError"),
}


@pytest.mark.parametrize(("body", "outcome", "says"), ASYNC_FAULTS.values(), ids=ASYNC_FAULTS)
def test_an_async_call_that_fails_fails_alone(body: str, outcome: str, says: str) -> None:
    text = (
        "async def f(prompt, completion, example):\n    import asyncio\n    if completion == 'bad':\n"
        f"{textwrap.indent(textwrap.dedent(body).strip(), ' ' * 8)}\n"
        "    await asyncio.sleep(0.01)\n    return float(completion)\n"
    )
    completions = [*map(str, range(6)), "bad", *map(str, range(6, 12))]
    with pool([named("f", text)], workers=2, limits=reward_pools.SHORT, runtime={"concurrency": 4}) as scoring:
        scores = [score["f"] for score in scoring.score([Group("p", {}, completions)])[0]]
    bad = scores.pop(6)
    assert [(score.outcome, score.value) for score in scores] == [("ok", float(n)) for n in range(12)]
    assert (bad.outcome, bad.value) == (outcome, 0.0)
    assert says in (bad.error or "")


def test_sync_and_async_functions_in_one_set() -> None:
    with pool([named("sync", COUNTS.replace("def f", "def sync")), named("f", SLEEPS)], workers=2) as scoring:
        scores = scoring.score([Group("p", {}, ["0.01"] * 5), Group("q", {}, ["0.02"] * 5)])
    assert values(scores) == [0.01] * 5 + [0.02] * 5
    assert all(score["sync"].outcome == "ok" for group in scores for score in group)


# ---- whole groups ---------------------------------------------------------------------------------------------------

RANKS = """
    def f(prompt, completions, example):
        print(prompt, len(completions))
        completions.sort  # a list
        order = sorted(completions, key=len)
        return [order.index(completion) + example["base"] for completion in completions]
    """


@pytest.mark.parametrize("mode", ["warm", "chunk", "call"])
def test_a_group_function_sees_all_completions_of_a_prompt(mode: str) -> None:
    groups = [Group("p", {"base": 0}, ["xx", "x", "xxxx"]), Group("q", {"base": 10}, ["a"]), Group("r", {}, [])]
    one = "def one(prompt, completion, example): return len(completion)"
    functions = [named("f", RANKS, per="group"), named("one", one)]
    with pool(functions, workers=2, runtime={"mode": mode}) as scoring:
        scores = scoring.score(groups)
    assert [[score["f"].value for score in group] for group in scores] == [[1.0, 0.0, 2.0], [10.0], []]
    assert [[score["one"].value for score in group] for group in scores] == [[2.0, 1.0, 4.0], [1.0], []]
    assert [score["f"].prints for score in scores[0]] == ["p 3\n", "", ""]


GROUP_FAULTS = {
    "too few": ("return [1.0]", "not_a_number", "returned 1 numbers for 3 completions"),
    "no list": ("return 1.0", "not_a_number", "returned a float; return a list"),
    "raises": ("return completions[3]", "exception", "IndexError"),
    "hangs": ("while True: pass", "timeout", "line 3"),
    "dies": ("import os; os._exit(4)", "crash", "exit code 4"),
    "leaves a process": ("import os, time\n    if os.fork() == 0: time.sleep(1e6)\n    return [1, 1, 1]", "ok", ""),
}


@pytest.mark.parametrize(("body", "outcome", "says"), GROUP_FAULTS.values(), ids=GROUP_FAULTS)
def test_a_failure_is_that_of_every_completion_of_the_group(body: str, outcome: str, says: str) -> None:
    text = f"def f(prompt, completions, example):\n    if prompt == 'good': return [7] * len(completions)\n    {body}"
    groups = [Group("good", {}, ["a", "b"]), Group("bad", {}, ["a", "b", "c"]), Group("good", {}, ["a"])]
    with pool([named("f", text, per="group")], workers=1, limits=reward_pools.SHORT) as scoring:
        first, bad, last = scoring.score(groups)
    assert [score["f"].value for score in (*first, *last)] == [7.0] * 3
    assert [(score["f"].outcome, says in (score["f"].error or "")) for score in bad] == [(outcome, True)] * 3


def test_numbers_of_a_group_are_judged_one_by_one() -> None:
    text = "def f(prompt, completions, example): return [1.0, None, 'x', float('nan')]"
    groups = [Group("p", {}, list("abcd"))]
    with pool([named("f", text, per="group", none="abstain", on_error="exclude")], workers=1) as scoring:
        scores = [score["f"] for score in scoring.score(groups)[0]]
    assert [score.outcome for score in scores] == ["ok", "abstain", "not_a_number", "not_a_number"]
    assert [score.value for score in scores] == [1.0, None, None, None]


def test_a_group_function_returns_an_array() -> None:
    text = "def f(prompt, completions, example):\n    import numpy\n    return numpy.arange(len(completions)) / 2"
    with pool([named("f", text, per="group")], workers=1) as scoring:
        assert values(scoring.score([Group("p", {}, list("abc"))])) == [0.0, 0.5, 1.0]


def test_async_group_functions() -> None:
    text = """
        async def f(prompt, completions, example):
            import asyncio
            await asyncio.sleep(0.01)
            return [len(completions)] * len(completions)
        """
    with pool([named("f", text, per="group")], workers=1) as scoring:
        assert values(scoring.score([Group("p", {}, list("abc")), Group("q", {}, list("de"))])) == [3, 3, 3, 2, 2]


@pytest.mark.parametrize(
    ("text", "per", "says"),
    [
        ("def f(prompt, completions, example): return [1]", "completion", "all completions of a prompt"),
        ("def f(prompt, completion, example): return 1", "group", "takes one completion, but per='group'"),
        ("def f(prompts, completions, answer): return 1", "group", "takes whole batches"),
    ],
)
def test_the_marker_and_the_signature_have_to_agree(text: str, per: str, says: str) -> None:
    with pytest.raises(RewardPoolError, match=says):
        reward_pools.pool([reward_pools.RevisionFunction(name="f", source=text, source_sha256="", per=per)]).start()


def test_threads_of_an_import_give_every_executor_a_sandbox_of_its_own(every_tier: Tier) -> None:
    text = """
        def f(prompt, completion, example=__import__("threading").Thread(
            target=__import__("time").sleep, args=(1e6,), daemon=True).start()):
            import os
            if completion == "die":
                os._exit(5)
            while completion == "hang":
                pass
            return float(completion)
        """
    with pool([named("f", text)], workers=2, limits=reward_pools.SHORT) as scoring:
        assert any("starts threads" in note for note in scoring.take_notes())
        scores = scoring.score([Group("p", {}, ["1", "die", "2", "hang", "3"])])[0]
        assert [score["f"].outcome for score in scores] == ["ok", "crash", "ok", "timeout", "ok"]
        assert values([scores])[::2] == [1.0, 2.0, 3.0]
        assert "exit code 5" in (scores[1]["f"].error or "")
        assert 'File "<reward function f>", line' in (scores[3]["f"].error or "")
    orphans = [p.info["cmdline"] for p in psutil.process_iter(["cmdline", "ppid"]) if p.info["ppid"] == 1]
    assert not [words for words in orphans if "from inside import zygote" in " ".join(words or ())]
