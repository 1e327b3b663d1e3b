"""Reward functions in their sandbox: calls per second, time to start and to replace an executor, what a step pays.

    python bench/rewards.py --json FILE [--short] [--cases calls modes start replace programs step] [--packages DIR]

In the table, "ours" is the sandbox that this machine gives to jobs, the other column the same executors without any
protection (tier S0); where a replaced executor is timed, it is a new sandbox that has to import everything again.
`step` runs rollout and update of the `ragged` case, with scoring beside generation and without any. `--packages` is a
folder with math_verify, where that is not installed.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from harness import Report, Row, arguments, repeats_of, reporting

from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.rewards.sandbox import probe
from rewardsmith.rewards.sandbox.tiers import Tier
from rewardsmith.wire import RevisionFunction

PARTS = ("step", "calls", "modes", "start", "replace", "programs")
PROMPT, COMPLETION = "a question " * 40, "an answer " * 120  # with the row, some 2 kB for each call
ROW = {"answer": 42, "text": "x" * 400, "numbers": list(range(20))}
TRIVIAL = "def trivial(prompt, completion, example):\n    return float(len(completion))"
VERIFIES = """
def verifies(prompt, completion, example):
    from math_verify import parse, verify
    return float(len(completion))
"""
BURNS = """
def burns(prompt, completion, example):
    import time
    until = time.perf_counter() + {seconds}
    while time.perf_counter() < until:
        pass
    return float(len(completion))
"""
RUNS = """
def runs(prompt, completion, example):
    from reward_tools import run_python
    return float(run_python("print(1 + 1)").out)
"""


def function(source: str) -> RevisionFunction:
    name = source.strip().removeprefix("def ").partition("(")[0]
    return RevisionFunction(name=name, source=source.strip(), source_sha256="")


def groups_of(calls: int) -> list[Group]:
    """`calls` completions, 8 of each prompt."""
    sizes = [8] * (calls // 8) + ([calls % 8] if calls % 8 else [])
    return [Group(PROMPT, ROW, [f"{COMPLETION}{n}" for n in range(size)]) for size in sizes]


@contextmanager
def pools(source: str, **settings: Any) -> Iterator[list[RewardPool]]:
    """One in the machine's best tier, one in S0; both with one executor."""
    tiers = [Tier[probe.report().tier], Tier.S0]
    both = [RewardPool([function(source)], workers=1, tier=tier, **settings) for tier in tiers]
    with both[0], both[1]:
        yield both


def in_turn(acts: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """What each of them answers, A B A B, after one round that does not count."""
    for act in acts:
        act()
    found = [[act() for act in acts] for _ in range(repeats)]
    return [list(values) for values in zip(*found, strict=True)]


def calls_per_second(pool: RewardPool, batch: int, least: float) -> float:
    groups, scored, started = groups_of(batch), 0, time.perf_counter()
    while time.perf_counter() < started + least:
        pool.score(groups)
        scored += batch
    return scored / (time.perf_counter() - started)


def calls(report: Report, repeats: int, least: float) -> None:
    with pools(TRIVIAL) as both:
        for batch in (1, 8, 64, 512):
            acts = [lambda pool=pool, batch=batch: calls_per_second(pool, batch, least) for pool in both]
            rates = in_turn(acts, repeats)
            report.add(Row.of(f"batches of {batch}", "trivial function", "calls/s", *rates, higher_is_better=True))


def modes(report: Report, repeats: int, least: float) -> None:
    for mode in ("chunk", "call"):
        with pools(TRIVIAL, runtime={"mode": mode}) as both:
            acts = [lambda pool=pool: calls_per_second(pool, 64, least) for pool in both]
            rates = in_turn(acts, repeats)
            report.add(Row.of(f"mode {mode}", "batches of 64", "calls/s", *rates, higher_is_better=True))


def seconds_to_start(source: str, tier: Tier, **settings: Any) -> float:
    started = time.perf_counter()
    with RewardPool([function(source)], workers=1, tier=tier, **settings):
        return time.perf_counter() - started


def start(report: Report, repeats: int) -> None:
    tiers = [Tier[probe.report().tier], Tier.S0]
    seconds = in_turn([lambda tier=tier: seconds_to_start(TRIVIAL, tier) for tier in tiers], repeats)
    report.add(Row.of("start", "to the first executor", "ms", *_ms(seconds)))


def seconds_to_replace(pool: RewardPool) -> float:
    """From the death of the executor to the next result."""
    while len(found := _executors()) != 1:  # those before may still be on their way out
        time.sleep(0.001)
    started = time.perf_counter()
    os.kill(found[0], signal.SIGKILL)
    pool.score(groups_of(1))
    return time.perf_counter() - started


def _executors() -> list[int]:
    """The innermost processes."""
    alive = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    parents = {process.ppid() for process in alive}
    return [process.pid for process in alive if process.pid not in parents]


def replace(report: Report, repeats: int, packages: Path | None) -> None:
    tier = Tier[probe.report().tier]
    settings: dict[str, Any] = {} if packages is None else {"site_dirs": [packages]}
    sources = {"bare": TRIVIAL}
    if packages or find_spec("math_verify"):
        sources["math_verify loaded"] = VERIFIES
    for name, source in sources.items():
        with RewardPool([function(source)], workers=1, tier=tier, **settings) as pool:
            pool.score(groups_of(8))
            acts = [lambda pool=pool: seconds_to_replace(pool)]
            seconds = in_turn(acts, 3 * repeats)
        again = in_turn([lambda source=source: seconds_to_start(source, tier, **settings)], repeats)
        row = Row.of("replace", name, "ms", *_ms([*seconds, *again]), note="theirs: a new sandbox")
        report.add(row)


def programs(report: Report, repeats: int, least: float) -> None:
    with pools(RUNS) as both:
        rates = in_turn([lambda pool=pool: calls_per_second(pool, 8, least) for pool in both], repeats)
    report.add(Row.of("run_python", "one after the other", "ms", *[[1000 / rate for rate in side] for side in rates]))


def step(report: Report, repeats: int) -> None:
    """The same rollout with and without scoring beside it, and an update: the difference is what scoring costs."""
    from cases import RAGGED, make_model, make_tokenizer
    from ours import Steps, settings

    from rewardsmith.train.clock import Clock
    from rewardsmith.train.learner import Learner
    from rewardsmith.train.parallel.ranks import Ranks
    from rewardsmith.train.samples import roll_out

    with Ranks.of_this_machine() as ranks:
        config = settings(RAGGED)
        learner = Learner(make_model(RAGGED), make_tokenizer(RAGGED), config, ranks=ranks)
        steps = Steps(RAGGED, learner, config)
        learner.deliver(0)
        for milliseconds in (0.1, 1.0):
            shares, whole = [], []
            with RewardPool([function(BURNS.format(seconds=milliseconds / 1000))]) as pool:
                for repeat in range(3 * repeats + 1):
                    scored = lambda pool=pool: roll_out(  # noqa: E731
                        learner.engine,
                        pool,
                        steps.next_prompts(),
                        config,
                        Clock(),
                        steps.taken,
                        {"burns": 1.0},
                        lambda: None,
                    )
                    first, second = (scored, steps.draw) if repeat % 2 else (steps.draw, scored)
                    spent = {first: _timed(first), second: _timed(second)}
                    groups = spent[steps.draw][1]
                    update = sum(steps.learn(groups).values())
                    if repeat:  # the first one warms up
                        whole.append(spent[steps.draw][0] + update)
                        shares.append(100 * (spent[scored][0] - spent[steps.draw][0]) / whole[-1])
            note = f"of a step of {1000 * statistics.median(whole):.0f} ms with {RAGGED.completions} calls"
            report.add(Row.of("step", f"scoring, {milliseconds:g} ms a call", "%", shares, note=note))


def _timed(act: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    answer = act()
    return time.perf_counter() - started, answer


def _ms(sides: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[1000 * seconds for seconds in side] for side in sides]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, metavar="DIR", help="a folder with math_verify")
    options = parser.parse_args()
    chosen, repeats = options.cases or PARTS, repeats_of(options)
    least = 0.5 if options.short else 2.0
    with reporting("rewards", options.json) as report:
        found = probe.report()
        report.conditions |= {"tier": found.tier, "executors": 1, "request_bytes": len(PROMPT) + len(COMPLETION) + 600}
        if "step" in chosen:  # first: ranks are forked before there are threads
            step(report, repeats)
        if "calls" in chosen:
            calls(report, repeats, least)
        if "modes" in chosen:
            modes(report, repeats, least)
        if "start" in chosen:
            start(report, repeats)
        if "replace" in chosen:
            replace(report, repeats, options.packages)
        if "programs" in chosen:
            programs(report, repeats, least)


if __name__ == "__main__":
    main()
