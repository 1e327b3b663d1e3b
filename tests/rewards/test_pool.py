"""The pool: values, order, texts, settings, loading, and what is left when it ends."""

import gc
import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rewardsmith.errors import RewardPoolError
from rewardsmith.rewards import source
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.rewards.process import Limits
from rewardsmith.wire import RevisionFunction

Wait = Callable[[Callable[[], object]], None]
SHORT = Limits(call_seconds=0.4, load_seconds=1.0)


def named(name: str, function: Callable[..., Any] | str, **settings: Any) -> RevisionFunction:
    text = textwrap.dedent(function).strip() if isinstance(function, str) else source.source_of(function)
    return RevisionFunction(name=name, source=text, source_sha256="", **settings)


def score_one(function: Callable[..., Any] | str, completion: str = "c", prompt: str = "p", **settings: Any) -> Score:
    example = settings.pop("example", {})
    with RewardPool([named("f", function, **settings)], workers=1, limits=SHORT) as pool:
        return pool.score([Group(prompt, example, [completion])])[0][0]["f"]


# ---- values ---------------------------------------------------------------------------------------------------------


def test_every_call_gets_its_own_prompt_completion_and_example() -> None:
    def place(prompt, completion, example):
        return 100 * int(prompt) + int(completion) + example["add"]

    def negative(prompt, completion, example):
        return -int(completion)

    groups = [Group(str(g), {"add": g / 10}, [str(c) for c in range(g)]) for g in range(30)]
    with RewardPool([named("place", place), named("negative", negative)], workers=2, limits=SHORT) as pool:
        for _ in range(2):
            scores = pool.score(groups)
            assert [len(group) for group in scores] == list(range(30))
            assert [[score["place"].value for score in group] for group in scores] == [
                [100 * g + c + g / 10 for c in range(g)] for g in range(30)
            ]
            assert all(
                list(score) == ["place", "negative"] and score["negative"].value == -c
                for group in scores
                for c, score in enumerate(group)
            )
        assert pool.score([]) == []


def test_documented_rewards_run_as_they_are() -> None:
    path = Path(__file__).parents[3] / "shared" / "acceptance" / "seed_rewards.py"
    if not path.exists():
        pytest.skip(f"the documented rewards are not at {path}")
    spec = importlib.util.spec_from_file_location("seed_rewards", path)
    assert spec and spec.loader
    seed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seed)
    functions = [named(f.__name__, f) for f in (seed.format_reward_func, seed.equation_reward_func)]
    functions.append(named("v2", seed.equation_reward_func_v2))
    right, wrong = "<think>so</think>\n<answer>(1 + 2) * 3</answer>", "<think>so</think>\n<answer>1 + 2 + 3</answer>"
    with RewardPool(functions, workers=1) as pool:
        for nums in ([1, 2, 3], "[1, 2, 3]"):
            scores = pool.score([Group("p", {"nums": nums, "target": "9"}, [right, wrong, "9"])])[0]
            assert [[score.value for score in of_one.values()] for of_one in scores] == [
                [1.0, 1.0, 1.0],
                [1.0, 0.0, 0.5],
                [0.0, 0.0, 0.0],
            ]
            assert scores[2]["v2"].prints == "no answer tag\n"


@pytest.mark.parametrize(
    ("expression", "value"),
    [("True", 1.0), ("3", 3.0), ("-0.25", -0.25), ("10 ** 12", 1e12), ("type('F', (float,), {})(2)", 2.0)],
)
def test_numbers_of_python(expression: str, value: float) -> None:
    score = score_one(f"def f(prompt, completion, example): return {expression}")
    assert (score.outcome, score.value, score.error) == ("ok", value, None)


def test_numbers_of_numpy() -> None:
    def f(prompt, completion, example):
        import numpy

        return {
            "scalar": numpy.float32(0.5),
            "int": numpy.int64(7),
            "bool": numpy.True_,
            "no dimension": numpy.array(2.0),
            "one element": numpy.array([[3.0]]),
        }[completion]

    kinds = ["scalar", "int", "bool", "no dimension", "one element"]
    with RewardPool([named("f", f)], workers=1) as pool:
        assert [s["f"].value for s in pool.score([Group("p", {}, kinds)])[0]] == [0.5, 7.0, 1.0, 2.0, 3.0]


@pytest.mark.slow
def test_numbers_of_torch() -> None:
    def f(prompt, completion, example):
        import torch

        number = torch.tensor([[0.5]], requires_grad=True)
        return number if completion == "one element" else torch.ones(2)

    with RewardPool([named("f", f)], workers=1) as pool:
        one, two = pool.score([Group("p", {}, ["one element", "two"])])[0]
    assert (one["f"].outcome, one["f"].value) == ("ok", 0.5)
    assert two["f"].outcome == "not_a_number"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\ud800 alone \udfff",
        "a\0b",
        "\N{PILE OF POO}\u200d\U0001f3fd",
        "\r\n\u2028\x0c\x85",
        "\x1b[2J",
        "é" * 500_000,
    ],
    ids=["empty", "surrogates", "NUL", "emoji", "line ends", "escape codes", "1 MB"],
)
def test_texts_arrive_unharmed(text: str) -> None:
    def f(prompt, completion, example):
        print(completion[:9])
        return float([hex(ord(c)) for c in prompt] == example["codes"] and prompt == completion == example["text"])

    example = {"text": text, "codes": [hex(ord(character)) for character in text]}
    assert score_one(f, completion=text, prompt=text, example=example).value == 1.0


def test_large_and_many_texts_at_once() -> None:
    def f(prompt, completion, example):
        return len(completion)

    with RewardPool([named("f", f)], workers=2) as pool:
        lengths = [1_000_000, 3, 2_000_000, 0, *range(100), 1_500_000]
        scores = pool.score([Group("p", {}, ["x" * length for length in lengths])])[0]
    assert [score["f"].value for score in scores] == lengths


def test_values_of_the_example_keep_their_types_and_each_call_has_its_own() -> None:
    def f(prompt, completion, example):
        kinds = [type(value).__name__ for value in example.values()]
        example["list"].append(1)
        example["new"] = 1
        return float(kinds == ["list", "int", "float", "bool", "NoneType", "dict", "str"] and len(example["list"]) == 2)

    row = {"list": [0], "int": 1, "float": 1.0, "bool": True, "none": None, "dict": {"a": [1]}, "str": "1"}
    with RewardPool([named("f", f), named("g", f)], workers=1) as pool:
        scores = pool.score([Group("p", row, ["a", "b", "c"])])[0]
    assert all(score.value == 1.0 for both in scores for score in both.values())
    assert row["list"] == [0]


# ---- settings of a function -----------------------------------------------------------------------------------------


def test_prints_of_each_call_and_traceback_with_the_users_line() -> None:
    def f(prompt, completion, example):
        import logging
        import sys

        logging.basicConfig()
        print("seen", completion)
        sys.stderr.write("and more\n")
        logging.warning("of %s", completion)
        return example[completion]  # the line at fault

    with RewardPool([named("f", f)], workers=1) as pool:
        first, second = (score["f"] for score in pool.score([Group("p", {"a": 1}, ["a", "b"])])[0])
    assert first.prints == "seen a\nand more\nWARNING:root:of a\n"
    assert second.prints == "seen b\nand more\nWARNING:root:of b\n"
    assert second.error is not None
    assert second.error.startswith('Traceback (most recent call last):\n  File "<reward function f>", line 9, in f\n')
    assert "return example[completion]  # the line at fault" in second.error
    assert second.error.endswith("KeyError: 'b'\n")


def test_long_prints_are_cut_and_counted() -> None:
    prints = score_one("def f(prompt, completion, example): print('é' * 5000); return 1").prints
    assert prints == "é" * 2048 + "\n[5905 more bytes were printed]"


RAISES = "def f(prompt, completion, example): raise ValueError('no')"


@pytest.mark.parametrize(("on_error", "value"), [("zero", 0.0), ("exclude", None)])
def test_what_an_error_counts(on_error: str, value: float | None) -> None:
    score = score_one(RAISES, on_error=on_error)
    assert (score.outcome, score.value) == ("exception", value)


def test_on_error_fail_names_function_and_reason_and_leaves_the_pool_usable() -> None:
    def f(prompt, completion, example):
        return 1 / int(completion)

    with RewardPool([named("inverse", f, on_error="fail")], workers=2) as pool:
        with pytest.raises(RewardPoolError, match=r"'inverse' failed.*exception(.|\n)*ZeroDivisionError"):
            pool.score([Group("p", {}, ["1", "2", "0", "4"] * 20)])
        assert pool.score([Group("p", {}, ["4"])])[0][0]["inverse"].value == 0.25


def test_none_is_an_error_or_an_abstention() -> None:
    nothing = "def f(prompt, completion, example): return None"
    assert score_one(nothing).outcome == "not_a_number"
    score = score_one(nothing, none="abstain", on_error="fail")
    assert (score.outcome, score.value, score.error) == ("abstain", None, None)
    assert score_one("def f(prompt, completion, example): return 'x'", none="abstain").outcome == "not_a_number"


# ---- the surroundings -----------------------------------------------------------------------------------------------


def test_environment_is_empty_and_nothing_is_inherited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def f(prompt, completion, example):
        import os
        import sys

        print(sorted(os.environ))
        descriptors = [fd for fd in range(256) if os.path.exists(f"/proc/self/fd/{fd}")]
        print(len(descriptors), any("rewardsmith/rewards" in folder for folder in sys.path), sys.stdin.read() == "")
        print(os.getcwd() == os.environ["HOME"], os.getsid(0) == os.getpid())
        return hash("the same in every process") % 1000

    monkeypatch.setenv("REWARDSMITH_API_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    secret = (tmp_path / "secret").open("w")
    os.set_inheritable(secret.fileno(), True)
    with secret:
        first, second = score_one(f), score_one(f)
    environment, channels, place, *_ = first.prints.splitlines()
    threads = [f"{library}_NUM_THREADS" for library in ("MKL", "NUMEXPR", "OMP", "OPENBLAS")]
    assert eval(environment) == sorted(["HOME", "LANG", "PYTHONHASHSEED", "TMPDIR", *threads])
    assert channels == "5 False True"  # 0, 1, 2 and the two channels
    assert place == "True True"
    assert first.value == second.value


def test_functions_share_no_names_and_programs_and_pools_work() -> None:
    def leaves_names(prompt, completion, example):
        global found
        found = 1
        return found

    def looks_for_names(prompt, completion, example):
        return float("found" in globals())

    def uses_the_machine(prompt, completion, example):
        import asyncio
        import multiprocessing
        import signal
        import subprocess
        import tempfile

        async def one():
            await asyncio.sleep(0)
            return 1

        with tempfile.TemporaryFile() as file:
            file.write(b"x")
        rung = []
        signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        while not rung:
            pass
        with multiprocessing.get_context("fork").Pool(2) as pool:
            squares = pool.map(abs, [-1, -2])
        return asyncio.run(one()) + sum(squares) + len(subprocess.run(["echo", "x"], capture_output=True).stdout)

    functions = [named(f.__name__, f) for f in (leaves_names, looks_for_names, uses_the_machine)]
    with RewardPool(functions, workers=1) as pool:
        score = pool.score([Group("p", {}, ["c"])])[0][0]
    assert [s.value for s in score.values()] == [1.0, 0.0, 6.0], score


def test_memory_filled_by_earlier_calls_is_not_blamed_on_a_later_one() -> None:
    def leaks(prompt, completion, example):
        global kept
        try:
            kept.append(bytearray(50_000_000))
        except NameError:
            kept = [bytearray(50_000_000)]
        return float(completion)

    completions = [str(number) for number in range(12)]
    with RewardPool([named("leaks", leaks)], workers=2, limits=Limits(memory_bytes=200 * 2**20)) as pool:
        scores = pool.score([Group("p", {}, completions)])[0]
    assert [(score["leaks"].outcome, score["leaks"].value) for score in scores] == [("ok", float(n)) for n in range(12)]


# ---- loading --------------------------------------------------------------------------------------------------------


BROKEN = {
    "free name": ("def f(prompt, completion, example): return re.x", "'f': line 1: `re` .*import re"),
    "arity": ("def f(prompt): return 1", "'f': line 1: .*three parameters"),
    "missing package": (
        """
        def f(prompt, completion, example):
            import math
            from no_such_package import score
            return score(completion)
        """,
        "'f' cannot be loaded: (.|\n)*line 3(.|\n)*No module named 'no_such_package'",
    ),
    "missing name": (
        "def f(prompt, completion, example): from math import sinn; return 1",
        "cannot import name 'sinn'",
    ),
    "default raises": ("def f(prompt, completion, example=1 / 0): return 1", "line 1(.|\n)*ZeroDivisionError"),
    "default exits": ("def f(prompt, completion, example=__import__('os')._exit(4)): return 1", "exit code 4"),
    "default loops": (
        "def f(prompt, completion, example=[0 for _ in iter(int, 1)]): return 1",
        "'f' cannot be loaded: no result after 1 s(.|\n)*line 1",
    ),
}


@pytest.mark.parametrize(("text", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_function_is_refused_at_start(text: str, says: str) -> None:
    good = named("good", "def f(prompt, completion, example): return 1.0")
    pool = RewardPool([good, named("f", text)], workers=2, limits=SHORT)
    with pytest.raises(RewardPoolError, match=says):
        pool.start()
    with pytest.raises(RewardPoolError, match="closed"):
        pool.score([Group("p", {}, ["c"])])


def test_imports_that_may_fail_do_not_keep_a_function_from_loading() -> None:
    def f(prompt, completion, example):
        try:
            import no_such_package
        except ImportError:
            no_such_package = None
        if completion == "use it":
            import another_missing_package

            return another_missing_package
        return float(no_such_package is None)

    assert score_one(f).value == 1.0


def test_names_of_the_signatures_annotations_need_not_exist_where_it_runs() -> None:
    text = "def f(prompt: Prompt, completion: 'x', example: dict[str, Any]) -> Reward: return 1.0"
    assert score_one(text).value == 1.0


def test_a_worker_that_cannot_be_started_again_is_no_fault_of_the_function() -> None:
    text = """
        def f(prompt, completion, example=__import__("os").mkdir("only-once")):
            if completion == "die":
                import os
                os._exit(1)
            return 1.0
        """
    with RewardPool([named("f", text, on_error="fail")], workers=1) as pool:
        before, died, after = (score["f"] for score in pool.score([Group("p", {}, ["live", "die", "live"])])[0])
        assert before.value == 1.0
        for score in (died, after):
            assert (score.outcome, score.value) == ("infrastructure", None)
            assert score.error is not None and "FileExistsError" in score.error


# ---- the end --------------------------------------------------------------------------------------------------------

IDENTITY = "def f(prompt, completion, example): import os; return os.getpid()"


def gone(pid: float | None) -> bool:
    assert pid is not None
    return not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_workers_outlive_the_thread_that_started_the_pool() -> None:
    pool = RewardPool([named("f", IDENTITY)], workers=1)
    seen = []

    def start() -> None:
        pool.start()
        seen.append(pool.score([Group("p", {}, ["c"])])[0][0]["f"].value)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    seen.append(pool.score([Group("p", {}, ["c"])])[0][0]["f"].value)
    assert seen[0] == seen[1]
    pool.close()
    assert not psutil.pid_exists(int(seen[0]))
    pool.close()


def test_a_worker_killed_between_two_scores_is_replaced(wait_until: Wait) -> None:
    with RewardPool([named("f", IDENTITY)], workers=1) as pool:
        first = pool.score([Group("p", {}, ["c"])])[0][0]["f"].value
        psutil.Process(int(first or 0)).kill()
        wait_until(lambda: gone(first))
        second = pool.score([Group("p", {}, ["c"])])[0][0]["f"]
        assert (second.outcome, second.value != first) == ("ok", True)


def test_a_forgotten_pool_takes_its_workers_along(wait_until: Wait) -> None:
    pool = RewardPool([named("f", IDENTITY)], workers=1)
    pool.start()
    pid = pool.score([Group("p", {}, ["c"])])[0][0]["f"].value
    del pool
    gc.collect()
    wait_until(lambda: gone(pid))


HOST = '''
import sys
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.wire import RevisionFunction

text = """
def f(prompt, completion, example):
    import os
    while completion == "hang":
        pass
    return os.getpid()
"""
pool = RewardPool([RevisionFunction(name="f", source=text, source_sha256="")], workers=1)
pool.start()
print(int(pool.score([Group("p", {}, ["c"])])[0][0]["f"].value), flush=True)
if sys.argv[1] == "hang":
    pool.score([Group("p", {}, ["hang"])])
'''


@pytest.mark.parametrize("end", ["exits", "is killed"])
def test_workers_end_with_the_process_that_owns_the_pool(end: str, wait_until: Wait, tmp_path: Path) -> None:
    mode = "hang" if end == "is killed" else "exit"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed host leaves its scratch folder
    command = [sys.executable, "-c", HOST, mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        if end == "is killed":
            worker = psutil.Process(pid)
            started = worker.cpu_times().user
            wait_until(lambda: worker.cpu_times().user > started + 0.05)  # it is in the endless loop
            host.kill()
        assert (host.wait(timeout=20) == 0) == (end == "exits")
    wait_until(lambda: gone(pid))
