"""The pool: values, order, texts, settings, loading, and what is left when it ends."""

import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import reward_pools
from reward_pools import SHORT, named, pool, score_one

from rewardsmith.errors import RewardPoolError
from rewardsmith.rewards import fleet
from rewardsmith.rewards.grants import Grants
from rewardsmith.rewards.pool import Group
from rewardsmith.rewards.sandbox.limits import Limits
from rewardsmith.rewards.sandbox.tiers import Tier

Wait = Callable[[Callable[[], object]], None]
pytestmark = pytest.mark.usefixtures("every_tier")


# ---- values ---------------------------------------------------------------------------------------------------------


def test_every_call_gets_its_own_prompt_completion_and_example() -> None:
    def place(prompt, completion, example):
        return 100 * int(prompt) + int(completion) + example["add"]

    def negative(prompt, completion, example):
        return -int(completion)

    groups = [Group(str(g), {"add": g / 10}, [str(c) for c in range(g)]) for g in range(30)]
    with pool([named("place", place), named("negative", negative)], workers=2, limits=SHORT) as scoring:
        for _ in range(2):
            scores = scoring.score(groups)
            assert [len(group) for group in scores] == list(range(30))
            assert [[score["place"].value for score in group] for group in scores] == [
                [100 * g + c + g / 10 for c in range(g)] for g in range(30)
            ]
            assert all(
                list(score) == ["place", "negative"] and score["negative"].value == -c
                for group in scores
                for c, score in enumerate(group)
            )
        assert scoring.score([]) == []


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
    with pool(functions, workers=1) as scoring:
        for nums in ([1, 2, 3], "[1, 2, 3]"):
            scores = scoring.score([Group("p", {"nums": nums, "target": "9"}, [right, wrong, "9"])])[0]
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
    with pool([named("f", f)], workers=1) as scoring:
        assert [s["f"].value for s in scoring.score([Group("p", {}, kinds)])[0]] == [0.5, 7.0, 1.0, 2.0, 3.0]


@pytest.mark.slow
def test_numbers_of_torch() -> None:
    def f(prompt, completion, example):
        import torch

        number = torch.tensor([[0.5]], requires_grad=True)
        return number if completion == "one element" else torch.ones(2)

    with pool([named("f", f)], workers=1) as scoring:
        one, two = scoring.score([Group("p", {}, ["one element", "two"])])[0]
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
    assert score_one(f, completion=text, prompt=text, example=example, limits=Limits()).value == 1.0


def test_large_and_many_texts_at_once() -> None:
    def f(prompt, completion, example):
        return len(completion)

    with pool([named("f", f)], workers=2) as scoring:
        lengths = [1_000_000, 3, 2_000_000, 0, *range(100), 1_500_000]
        scores = scoring.score([Group("p", {}, ["x" * length for length in lengths])])[0]
    assert [score["f"].value for score in scores] == lengths


def test_values_of_the_example_keep_their_types_and_each_call_has_its_own() -> None:
    def f(prompt, completion, example):
        kinds = [type(value).__name__ for value in example.values()]
        example["list"].append(1)
        example["new"] = 1
        return float(kinds == ["list", "int", "float", "bool", "NoneType", "dict", "str"] and len(example["list"]) == 2)

    row = {"list": [0], "int": 1, "float": 1.0, "bool": True, "none": None, "dict": {"a": [1]}, "str": "1"}
    with pool([named("f", f), named("g", f)], workers=1) as scoring:
        scores = scoring.score([Group("p", row, ["a", "b", "c"])])[0]
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

    with pool([named("f", f)], workers=1) as scoring:
        first, second = (score["f"] for score in scoring.score([Group("p", {"a": 1}, ["a", "b"])])[0])
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

    with pool([named("inverse", f, on_error="fail")], workers=2) as scoring:
        with pytest.raises(RewardPoolError, match=r"'inverse' failed.*exception(.|\n)*ZeroDivisionError"):
            scoring.score([Group("p", {}, ["1", "2", "0", "4"] * 20)])
        assert scoring.score([Group("p", {}, ["4"])])[0][0]["inverse"].value == 0.25


def test_none_is_an_error_or_an_abstention() -> None:
    nothing = "def f(prompt, completion, example): return None"
    assert score_one(nothing).outcome == "not_a_number"
    score = score_one(nothing, none="abstain", on_error="fail")
    assert (score.outcome, score.value, score.error) == ("abstain", None, None)
    assert score_one("def f(prompt, completion, example): return 'x'", none="abstain").outcome == "not_a_number"


# ---- the surroundings -----------------------------------------------------------------------------------------------


def test_environment_is_empty_and_nothing_is_inherited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, every_tier: Tier
) -> None:
    def f(prompt, completion, example):
        import os
        import sys

        print(sorted(os.environ))
        descriptors = []
        for fd in range(256):
            try:
                os.fstat(fd)
                descriptors.append(fd)
            except OSError:
                pass
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
    expected = {f"{library}_NUM_THREADS" for library in ("MKL", "NUMEXPR", "OMP", "OPENBLAS")}
    expected |= {"HOME", "LANG", "PATH", "PYTHONHASHSEED", "TMPDIR", "USER"}
    assert set(eval(environment)) - {"PWD"} == expected
    assert channels == "5 False True"  # 0, 1, 2 and the two channels
    assert place == f"True {every_tier not in (Tier.S1, Tier.S1w)}"  # there, nothing may leave the sandbox's group
    assert first.value == second.value


def test_the_environment_for_the_functions_is_theirs_alone() -> None:
    def f(prompt, completion, example):
        import os

        return float(os.environ["JUDGE_KEY"] == "k-1" and "OTHER" not in os.environ)

    with pool([named("f", f)], workers=1, grants=Grants({"JUDGE_KEY": "k-1"})) as scoring:
        assert scoring.score([Group("p", {}, ["c"])])[0][0]["f"].value == 1.0
        assert not any("k-1" in word for process in reward_pools.processes() for word in process.cmdline())
        assert not any("JUDGE_KEY" in process.environ() for process in reward_pools.processes())


def test_functions_share_no_names_and_programs_and_pools_work(every_tier: Tier) -> None:
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
        squares = [1, 2]
        if example["shared memory"]:
            with multiprocessing.get_context("fork").Pool(2) as pool:
                squares = pool.map(abs, [-1, -2])
        return asyncio.run(one()) + sum(squares) + len(subprocess.run(["echo", "x"], capture_output=True).stdout)

    functions = [named(f.__name__, f) for f in (leaves_names, looks_for_names, uses_the_machine)]
    example = {"shared memory": every_tier not in (Tier.S1, Tier.S1w)}  # there is no /dev/shm of their own there
    with pool(functions, workers=1) as scoring:
        score = scoring.score([Group("p", example, ["c"])])[0][0]
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
    with pool([named("leaks", leaks)], workers=2, limits=Limits(memory_bytes=200 * 2**20)) as scoring:
        scores = scoring.score([Group("p", {}, completions)])[0]
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
    broken = pool([good, named("f", text)], workers=2, limits=SHORT)
    with pytest.raises(RewardPoolError, match=says):
        broken.start()
    with pytest.raises(RewardPoolError, match="closed"):
        broken.score([Group("p", {}, ["c"])])


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


ONE = "def f(prompt, completion, example): return 1.0"


def test_a_sandbox_that_cannot_be_started_again_is_no_fault_of_the_function(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pool([named("f", ONE, on_error="fail")], workers=1) as scoring:
        assert scoring.score([Group("p", {}, ["before"])])[0][0]["f"].value == 1.0
        with monkeypatch.context() as without:
            without.setattr(tempfile, "tempdir", str(tmp_path / "not there"))  # for what needs a scratch folder
            without.setenv("PATH", "")  # for what needs bubblewrap
            reward_pools.kill_all()
            for score in scoring.score([Group("p", {}, ["died", "after"])])[0]:
                assert (score["f"].outcome, score["f"].value) == ("infrastructure", None)
                assert score["f"].error is not None and "a sandbox cannot be started" in score["f"].error
        assert scoring.score([Group("p", {}, ["again"])])[0][0]["f"].value == 1.0


def test_a_sandbox_that_ends_again_and_again_ends_the_job_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "LONGEST_PAUSE_SECONDS", 0.001)
    with pool([named("f", ONE)], workers=1) as scoring:
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr(tempfile, "tempdir", "/not there")
        reward_pools.kill_all()
        with pytest.raises(RewardPoolError, match="ended 10 times without one result: "):
            for _ in range(10):
                scoring.score([Group("p", {}, ["c"])])


def test_scoring_can_be_interrupted_and_goes_on_later() -> None:
    slow = "def f(prompt, completion, example):\n    import time\n    time.sleep(float(completion))\n    return 1.0"
    with pool([named("f", slow)], workers=2, limits=Limits(call_seconds=60)) as scoring:
        said: list[str] = []

        def score() -> None:
            with pytest.raises(RewardPoolError) as caught:
                scoring.score([Group("p", {}, ["50"] * 4)])
            said.append(str(caught.value))

        thread = threading.Thread(target=score)
        thread.start()
        while thread.is_alive():
            scoring.interrupt()
            thread.join(0.05)
        assert said == ["scoring was interrupted"]
        assert scoring.score([Group("p", {}, ["0"])])[0][0]["f"].value == 1.0


# ---- the end --------------------------------------------------------------------------------------------------------


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_executors_outlive_the_thread_that_started_the_pool() -> None:
    scoring = pool([named("f", ONE)], workers=1)
    seen = []

    def start() -> None:
        scoring.start()
        scoring.score([Group("p", {}, ["c"])])
        seen.append(reward_pools.leaves())

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert scoring.score([Group("p", {}, ["c"])])[0][0]["f"].value == 1.0
    assert len(seen[0]) == 1 and reward_pools.leaves() == seen[0]
    scoring.close()
    assert not reward_pools.processes()
    scoring.close()


def test_an_executor_killed_between_two_scores_is_replaced(wait_until: Wait) -> None:
    with pool([named("f", ONE)], workers=1) as scoring:
        assert scoring.score([Group("p", {}, ["c"])])[0][0]["f"].value == 1.0
        (first,) = reward_pools.leaves()
        first.kill()
        wait_until(lambda: gone(first))
        assert scoring.score([Group("p", {}, ["c"])])[0][0]["f"].outcome == "ok"
        assert reward_pools.leaves() not in ([], [first])


def test_a_sandbox_killed_in_the_middle_is_replaced_and_no_call_is_blamed(wait_until: Wait) -> None:
    slow = "def f(prompt, completion, example):\n    import time\n    time.sleep(0.3)\n    return float(completion)"
    with pool([named("f", slow)], workers=2) as scoring:
        timer = threading.Timer(0.1, reward_pools.kill_all)
        timer.start()
        scores = scoring.score([Group("p", {}, ["1", "2", "3"])])[0]
        timer.join()
    assert [(score["f"].outcome, score["f"].value) for score in scores] == [("ok", n) for n in (1.0, 2.0, 3.0)]


def test_a_forgotten_pool_takes_its_executors_along(wait_until: Wait) -> None:
    scoring = pool([named("f", ONE)], workers=1)
    scoring.start()
    assert reward_pools.leaves()
    del scoring
    gc.collect()
    wait_until(lambda: not reward_pools.processes())


HOST = '''
import sys
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.rewards.sandbox.tiers import Tier
from rewardsmith.wire import RevisionFunction

text = """
def f(prompt, completion, example):
    import pathlib, tempfile
    pathlib.Path(tempfile.gettempdir(), "left").write_text("something")
    while completion == "hang":
        pass
    return 1.0
"""
pool = RewardPool([RevisionFunction(name="f", source=text, source_sha256="")], workers=1, tier=Tier[sys.argv[2]])
pool.start()
pool.score([Group("p", {}, ["c"])])
print("ready", flush=True)
if sys.argv[1] == "hang":
    pool.score([Group("p", {}, ["hang"])])
'''


@pytest.mark.parametrize("end", ["exits", "is killed"])
def test_executors_end_with_the_process_that_owns_the_pool(
    end: str, wait_until: Wait, tmp_path: Path, every_tier: Tier
) -> None:
    files = tmp_path / "temporary"
    files.mkdir()
    command = [sys.executable, "-c", HOST, "hang" if end == "is killed" else "exit", every_tier.name]
    environment = {**os.environ, "TMPDIR": str(files)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "ready\n"
        inside = reward_pools.leaves()
        if end == "is killed":
            wait_until(lambda: any(process.cpu_times().user > 0.1 for process in inside))  # it is in the endless loop
            host.kill()
        assert (host.wait(timeout=20) == 0) == (end == "exits")
    wait_until(lambda: all(map(gone, inside)))
    # At most an empty folder is left of a host that was killed.
    wait_until(lambda: [path for path in files.rglob("*") if not path.is_dir()] == [])
    assert end == "is killed" or list(files.iterdir()) == []
