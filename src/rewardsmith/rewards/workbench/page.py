"""A report for people: plain lines of at most WIDTH characters, figures first, findings last, nothing said by colour
alone. `Line.style` is a hint for a terminal that has colours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from rewardsmith.rewards.workbench.measures import TOTAL
from rewardsmith.rewards.workbench.probes import PROBES
from rewardsmith.rewards.workbench.words import counted, number, percent, plain, quoted, seconds

if TYPE_CHECKING:
    from rewardsmith.rewards.workbench.report import Finding, FunctionReport, ProbeScore, Report, Scores

WIDTH = 100
NAME_WIDTH = 24
FAULTS_SHOWN = 5  # of a function
GAMED_MARK = "!"
STYLES = {"serious": "bold red", "warning": "bold yellow", "note": "bold cyan"}


class Line(NamedTuple):
    text: str
    style: str = ""


def lines(report: Report) -> Iterator[Line]:
    yield Line(_title(report), "bold")
    for note in report.notes:
        yield from _wrapped(note, "  ")
    if report.completions:
        yield from _scores(report)
    yield from _calls(report)
    if any(pair.correlation is not None for pair in report.agreements):
        yield from _agreements(report)
    yield from _probes(report)
    yield from _findings(report.findings)


def _title(report: Report) -> str:
    given = f"{counted(report.completions, 'completion')} ({report.source})" if report.completions else "no completions"
    functions = counted(len(report.functions), "reward function")
    return plain(f"{functions}, {counted(report.rows, 'row')}, {given}", WIDTH)


def _scores(report: Report) -> Iterator[Line]:
    yield from _heading("Scores", ["weight", "mean", "lowest", "highest", "spread", "constant", "no signal"], 10)
    shown: list[tuple[str, str, Scores]] = [(f.name, f"{f.weight:g}", f.scores) for f in report.functions]
    for name, weight, scores in [*shown, (TOTAL, "", report.total)]:
        cells = [number(value) for value in (scores.mean, scores.lowest, scores.highest, scores.spread)]
        cells = [weight, *cells, percent(scores.constant_groups), percent(scores.no_signal)]
        yield _row(name, cells, 10)
    basis = {
        "measured": "as measured",
        "estimated": f"by all the ways of taking {report.group_size} completions of each group",
        "at most": f"at most: the sum over the different scores of (their share of the group)^{report.group_size}, on "
        "average",
        None: "not known without prompts of two completions or more",
    }[report.total.basis]
    yield from _small(
        "spread: mean standard deviation within groups. constant: groups whose scores are all the same. "
        f"no signal: share of such groups if they have {report.group_size} completions, {basis}."
    )


def _calls(report: Report) -> Iterator[Line]:
    yield from _heading("Calls", ["calls", "failed", "differing", "p50", "p95", "p99", "a step"], 10)
    for function in report.functions:
        took = function.seconds
        times = [seconds(value) for value in (took.p50, took.p95, took.p99, took.per_step)]
        cells = [str(function.calls), percent(function.failures / function.calls), percent(function.differing), *times]
        yield _row(function.name, cells, 10)
    workers = counted(report.workers, "worker")
    yield from _small(
        f"differing: scored otherwise the second time. a step: {counted(report.batch, 'completion')} "
        f"x mean seconds / {workers}, {seconds(report.seconds_per_step)} in all."
    )
    for function in report.functions:
        yield from _faults(function)


def _faults(function: FunctionReport) -> Iterator[Line]:
    other = {name: count for name, count in function.outcomes.items() if name in ("abstain", "infrastructure")}
    if other:
        told = ", ".join(f"{count} x {name}" for name, count in other.items())
        yield from _wrapped(f"{function.name}: {told}", "  ")
    for fault in islice(function.faults, FAULTS_SHOWN):
        at = f" at {fault.where}" if fault.where else ""
        yield from _wrapped(f"{function.name}: {fault.count} x {fault.outcome}{at}: {plain(fault.error, 200)}", "  ")
        yield from _wrapped(f"first in row {fault.row}, for {quoted(fault.completion, 60)}", "    ")
    if (more := len(function.faults) - FAULTS_SHOWN) > 0:
        yield Line(f"  {plain(function.name, NAME_WIDTH)}: and {counted(more, 'kind')} of failure more")


def _agreements(report: Report) -> Iterator[Line]:
    yield from _heading("Agreement", ["rank correlation", "groups"], 18)
    for pair in report.agreements:
        shown = "-" if pair.correlation is None else f"{pair.correlation:+.2f}"
        half = NAME_WIDTH // 2 - 1
        yield _row(f"{plain(pair.one, half)}, {plain(pair.other, half)}", [shown, str(pair.groups)], 18)


def _probes(report: Report) -> Iterator[Line]:
    kinds = [kind for kind in PROBES if any(probe.probe == kind for probe in report.probes)]
    if not kinds:
        return
    yield from _heading("Probes", kinds, 10)
    names = dict.fromkeys(probe.function for probe in report.probes)
    for name in names:
        by_kind = {probe.probe: probe for probe in report.probes_of(name)}
        yield _row(name, [_cell(by_kind.get(kind)) for kind in kinds], 10)
    told = "; ".join(f"{kind}: {PROBES[kind]}" for kind in kinds)
    yield from _small(
        f"Mean score of such texts, the best of each row. {GAMED_MARK} nearly as high as the best. {told}."
    )


def _cell(probe: ProbeScore | None) -> str:
    if probe is None:
        return "-"
    return f"{GAMED_MARK} {number(probe.mean)}" if probe.gamed else number(probe.mean)


def _findings(findings: Sequence[Finding]) -> Iterator[Line]:
    yield Line("")
    if not findings:
        yield Line("Nothing was found.", "bold")
        yield from _wrapped(
            "That does not prove the rewards right: read completions with a high score before a long run.", "  "
        )
        return
    count = counted(len(findings), "finding")
    yield Line(f"{count}, the most serious first" if len(findings) > 1 else count, "bold")
    for place, finding in enumerate(findings, 1):
        yield Line("")
        label = f"{place}. {finding.severity.upper()}: "
        first, *rest = _filled(label + finding.what, "", "   ")
        yield Line(first, STYLES[finding.severity])
        yield from (Line(text) for text in rest)
        yield from _wrapped(f"Why: {finding.why}", "   ", "        ")
        yield from _wrapped(f"Change: {finding.change}", "   ", "           ")


# ---- lines ----------------------------------------------------------------------------------------------------------


def _heading(title: str, columns: Sequence[str], width: int) -> Iterator[Line]:
    yield Line("")
    yield Line(f"{title:<{NAME_WIDTH + 2}}" + _cells(columns, width), "bold")


def _row(name: str, cells: Iterable[str], width: int) -> Line:
    return Line(f"  {plain(name, NAME_WIDTH):<{NAME_WIDTH}}" + _cells(cells, width))


def _cells(cells: Iterable[str], width: int) -> str:
    return "".join(f"{cell:>{width}}" for cell in cells)


def _small(text: str) -> Iterator[Line]:
    yield from (line._replace(style="dim") for line in _wrapped(text, "    "))


def _wrapped(text: str, first: str, then: str | None = None) -> Iterator[Line]:
    yield from (Line(line) for line in _filled(text, first, first if then is None else then))


def _filled(text: str, first: str, then: str) -> list[str]:
    shown = plain(text, len(text) + 1)
    return textwrap.wrap(shown, WIDTH, initial_indent=first, subsequent_indent=then, break_on_hyphens=False)
