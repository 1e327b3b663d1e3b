"""Findings about values: that never change, leave groups without signal, fit neither 0 to 1 nor each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rewardsmith.rewards.workbench.measures import same
from rewardsmith.rewards.workbench.probes import PROBES, REFERENCE
from rewardsmith.rewards.workbench.report import Finding, ProbeScore, Report, Severity
from rewardsmith.rewards.workbench.words import counted, joined, number, percent

SILENT = (0.5, 0.8)  # shares of the groups that teach nothing: half, nearly all
CONTRARY = -0.3  # rank correlation
CONTRARY_GROUPS = 3
FEW_GROUPS = 5
DROWNED = 10.0  # times the spread of another function
LEFT_OUT = 0.2


def constant(report: Report) -> Iterator[Finding]:
    for function in report.functions:
        probes = report.probes_of(function.name)
        value = function.constant if report.completions else _constant_on(probes)
        if value is None or function.failures == function.calls:
            continue
        everything = "every completion" if report.completions else "every probe"
        severity: Severity = "serious"
        others = [p for p in probes if p.mean is not None and p.highest is not None and not same(p.mean, value)]
        higher = [p for p in others if p.highest is not None and p.highest > value]
        right = [p.highest for p in higher if p.probe == REFERENCE]
        if right:
            what = f"; one of the row's own columns as the answer gets up to {number(right[0])}"
            change = "Give partial credit on the way there, take easier rows, or a base model that succeeds sometimes."
        elif higher:
            what = f"; {PROBES[higher[0].probe]} gets up to {number(higher[0].highest)}"
            change = "If any of the completions is a right answer, the function does not recognise it."
        elif others:
            severity, what = "note", f", which is its best: {PROBES[others[0].probe]} gets {number(others[0].mean)}"
            change = "Keep it if it guards what the model does already; to teach more, ask for more."
        else:
            what = ", and to every probe" if report.completions else ", the row's own columns among them"
            what *= bool(probes)
            change = "See whether it reads the completion at all, and where it returns."
        yield Finding(
            "constant",
            severity if function.weight else "note",
            function.name,
            f"`{function.name}` gives {number(value)} to {everything}{what}.",
            "What is the same for all completions of a prompt teaches nothing.",
            change,
        )


def no_signal(report: Report) -> Iterator[Finding]:
    total = report.total
    share = total.no_signal
    if share is None or share < SILENT[0] or all(f.constant is not None for f in report.weighted):
        return
    bound = total.basis == "at most"
    ends = ""
    if total.all_lowest is not None and total.all_highest is not None:
        ends = (
            f" Of the {counted(total.groups, 'group')} here, {percent(total.all_lowest)} have nothing but the lowest "
            f"total, {percent(total.all_highest)} nothing but the highest."
        )
    change = "Take easier rows, give partial credit, or raise num_generations."
    if (total.all_highest or 0.0) > (total.all_lowest or 0.0):
        change = "Leave out the rows that are solved already, or ask for more."
    if bound:
        change += f" To know more, sample groups of {report.group_size}."
    yield Finding(
        "no_signal",
        "serious" if share >= SILENT[1] and not bound else "warning",
        None,
        f"{'At most ' * bound}{percent(share)} of groups of {report.group_size} would teach nothing: "
        f"all their totals are the same.{ends}",
        "Such a group costs its sampling and gives no gradient.",
        change,
    )


def left_out(report: Report) -> Iterator[Finding]:
    missing, all_of_them = report.total.missing, report.total.missing + report.total.values
    if all_of_them and missing / all_of_them >= LEFT_OUT:
        yield Finding(
            "left_out",
            "warning",
            None,
            f"{missing} of {all_of_them} completions have no total: a function that counts has no value for them.",
            "They are left out of their groups, and groups of fewer than two teach nothing.",
            "Let fewer calls abstain or fail, or give such functions weight 0 and look at them only.",
        )


def out_of_range(report: Report) -> Iterator[Finding]:
    for function in report.functions:
        lowest, highest = function.scores.lowest, function.scores.highest
        if lowest is None or highest is None or (lowest >= 0 and highest <= 1):
            continue
        own = abs(function.weight) * (function.scores.spread or 0.0)
        drowned = [
            other.name
            for other in report.weighted
            if other is not function and (spread := other.scores.spread) and own >= DROWNED * abs(other.weight) * spread
        ]
        why = "0 to 1 is customary, and makes weights and curves comparable."
        if drowned:
            names = joined([f"`{name}`" for name in drowned])
            why = f"Its spread, times its weight, is {DROWNED:g} times that of {names} and more: that hardly counts."
        yield Finding(
            "out_of_range",
            "warning" if drowned else "note",
            function.name,
            f"`{function.name}` goes from {number(lowest)} to {number(highest)}.",
            why,
            "Scale it to 0 to 1 and say with its weight how much it counts.",
        )


def disagree(report: Report) -> Iterator[Finding]:
    weights = {function.name: function.weight for function in report.functions}
    for pair in report.agreements:
        sign = weights[pair.one] * weights[pair.other]
        if pair.correlation is None or pair.groups < CONTRARY_GROUPS or not sign:
            continue
        correlation = pair.correlation if sign > 0 else -pair.correlation
        if correlation <= CONTRARY:
            yield Finding(
                "disagree",
                "warning",
                pair.one,
                f"`{pair.one}` and `{pair.other}` want the opposite: rank correlation {correlation:.2f} within groups "
                f"({counted(pair.groups, 'group')} in which both vary).",
                "What one teaches the other takes back; the heavier one wins.",
                "Look at completions that one likes and the other does not, and decide which is right; "
                "or count one only where the other is content.",
            )


def thin(report: Report) -> Iterator[Finding]:
    if not report.completions:
        yield Finding(
            "no_completions",
            "note",
            None,
            "There were no completions: only the probes were run.",
            "Spread, groups without signal and agreement need what a model writes.",
            "Give completions of a run, or a base model to sample from.",
        )
    elif report.total.groups < FEW_GROUPS:
        yield Finding(
            "few_groups",
            "note",
            None,
            f"Only {counted(report.total.groups, 'prompt')} had two completions or more.",
            "Shares of so few groups are mostly chance.",
            "Take more rows, and several completions of each.",
        )


def _constant_on(probes: Sequence[ProbeScore]) -> float | None:
    """The one value that all probes got, the best text of each row."""
    values = [value for probe in probes for value in (probe.mean, probe.highest) if value is not None]
    return values[0] if len(values) > 2 and same(min(values), max(values)) else None
