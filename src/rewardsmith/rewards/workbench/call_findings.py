"""Findings about calls: that fail, that are late, that say something else the second time."""

from __future__ import annotations

from collections.abc import Iterator

from rewardsmith.rewards.outcomes import GUARDED_CALLS, GUARDED_SHARE
from rewardsmith.rewards.workbench.probes import PROBES
from rewardsmith.rewards.workbench.report import Finding, Report, Severity
from rewardsmith.rewards.workbench.words import counted, joined, number, percent, plain, seconds

NOISY = 0.5  # share of the variance within groups
SLOW = (1.0, 10.0)  # seconds a step: worth knowing, worth changing
NAMED = 3  # faults that a sentence can hold
ERROR = 120  # characters of one

REMEDY = {
    "exception": "A completion is any text: return 0.0 where it cannot be read.",
    "not_a_number": 'Return an int or a float on every path; to have no opinion, return None and set none="abstain".',
    "timeout": "Bound the work by the length of the text, or the size of the numbers, before doing it.",
    "crash": "The process died: keep what can crash or exit out of the function.",
    "out_of_memory": "Bound the work by the length of the text, or the size of the numbers, before doing it.",
    "output_limit": "Print less.",
}


def failing(report: Report) -> Iterator[Finding]:
    for function in report.functions:
        if not function.failures:
            continue
        share = function.failures / function.calls
        told = "; ".join(
            f"{fault.count} x {fault.outcome}"
            + f" at {fault.where}" * bool(fault.where)
            + f", {plain(fault.error, ERROR)}"
            for fault in function.faults[:NAMED]
        )
        why = {
            "zero": "A failed call counts as 0, as a wrong answer does, and right answers may be among them.",
            "exclude": "The completions that failed are left out of their groups and teach nothing.",
            "fail": 'With on_error="fail" the first of them ends the job.',
        }[function.on_error]
        if share > GUARDED_SHARE:
            why += f" Over {percent(GUARDED_SHARE)} of the first {GUARDED_CALLS} calls, the job pauses."
        first = function.faults[0]
        yield Finding(
            "failing",
            "serious" if share > GUARDED_SHARE or function.on_error == "fail" else "warning",
            function.name,
            f"`{function.name}` fails in {function.failures} of {function.calls} calls: {told}.",
            why,
            f"See {first.where}. " * bool(first.where) + REMEDY[first.outcome],
        )


def failing_on_probes(report: Report) -> Iterator[Finding]:
    """Of functions that took all completions; what a model has not written yet, it may write next."""
    for function in report.functions:
        failed = [p for p in report.probes_of(function.name) if p.failed]
        if function.failures or not failed:
            continue
        yield Finding(
            "failing_on_probes",
            "warning",
            function.name,
            f"`{function.name}` took every completion, but fails on "
            f"{joined([PROBES[p.probe] for p in failed])}: {plain(failed[0].error, ERROR)}.",
            "A model in training comes to write such texts too.",
            "Return 0.0 for what cannot be read.",
        )


def infrastructure(report: Report) -> Iterator[Finding]:
    for function in report.functions:
        if count := function.outcomes.get("infrastructure", 0):
            yield Finding(
                "infrastructure",
                "warning",
                function.name,
                f"{counted(count, 'call')} of `{function.name}` had no result for a reason that is not the function's.",
                "Such completions are left out of their groups.",
                "Look whether this machine has memory and processes to spare.",
            )


def failure_pays(report: Report) -> Iterator[Finding]:
    for function in report.weighted:
        lowest = function.scores.lowest
        if function.on_error == "zero" and lowest is not None and lowest < 0:
            yield Finding(
                "failure_pays",
                "warning" if function.failures else "note",
                function.name,
                f"`{function.name}` goes down to {number(lowest)}, and a call that fails counts as 0.",
                "A text that breaks the function earns more than a wrong answer.",
                'Give it on_error="exclude", or keep its scores at 0 and above.',
            )


def slow(report: Report) -> Iterator[Finding]:
    whole = report.seconds_per_step
    if whole >= SLOW[0]:
        slowest = max(report.functions, key=lambda function: function.seconds.per_step)
        yield Finding(
            "slow",
            "warning" if whole >= SLOW[1] else "note",
            slowest.name,
            f"Scoring takes about {seconds(whole)} for each step of {report.batch} completions, "
            f"{seconds(slowest.seconds.per_step)} of it in `{slowest.name}` "
            f"(p50 {seconds(slowest.seconds.p50)}, p99 {seconds(slowest.seconds.p99)} a call).",
            "A step is over when its last completion is scored; the rest of it is done while others are sampled.",
            "Do what is the same in each call once, reject hopeless completions first, or ask for less.",
        )


def not_repeatable(report: Report) -> Iterator[Finding]:
    for function in report.functions:
        if not function.differing:
            continue
        noisy = function.noise is not None and function.noise >= NOISY
        share = "" if function.noise is None else f"; {percent(function.noise)} of its spread within groups is chance"
        severity: Severity = "serious" if noisy else "warning"
        yield Finding(
            "not_repeatable",
            severity if function.weight else "note",
            function.name,
            f"`{function.name}` scored {percent(function.differing)} of the same completions otherwise "
            f"the second time{share}.",
            "Within a group chance is taken for merit, and what other figures say of this function is chance as well.",
            "Take randomness, time and state out of it; ask a judge with temperature 0, or take the mean of several.",
        )
