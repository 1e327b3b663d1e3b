"""Findings about probes: texts that deserve no reward and get one, right answers that get none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rewardsmith.rewards.workbench.measures import TOTAL
from rewardsmith.rewards.workbench.probes import PROBES, REFERENCE
from rewardsmith.rewards.workbench.report import Finding, ProbeScore, Report, Severity
from rewardsmith.rewards.workbench.words import joined, number, percent, quoted

MOST = 0.5  # of the rows, or of the way to the best
EXCERPT = 60  # characters
ANYTHING = {"echo", "long"}  # who rewards both does not read what is said
CONTENTS = ("echo", "hidden", "listed", "long")

ONE_ANSWER = "Judge the one answer that the completion commits to, in a fixed place, whole; score several 0."
INSTEAD = {
    "empty": "Score an empty answer 0 before looking at anything else.",
    "echo": "Take the answer from a fixed place in the completion; what the prompt says must not count.",
    "hidden": ONE_ANSWER,
    "listed": ONE_ANSWER,
    "long": "Bound what length can earn, or charge for it.",
    "tags": "Ask for each tag exactly once, in order, with something in it.",
}


def gameable(report: Report) -> Iterator[Finding]:
    """A function that says something else each time cannot be judged, nor can a total with such a function in it."""
    unsteady = {function.name for function in report.functions if function.differing}
    total_is_steady = not any(function.name in unsteady for function in report.weighted)
    totals = {p.probe: p for p in report.probes_of(TOTAL)} if total_is_steady else {}
    told: set[str] = set()
    for function in report.functions:
        gamed = {p.probe: p for p in report.probes_of(function.name) if p.gamed}
        if function.name in unsteady:
            continue
        told.update(gamed)
        if gamed.keys() >= ANYTHING:
            empty = [gamed.pop(kind) for kind in CONTENTS if kind in gamed]
            yield _pays_anything(function.name, empty, *_weight_of(empty, totals, function.weight))
        if gamed:
            rest = list(gamed.values())
            yield _gameable(report, function.name, rest, *_weight_of(rest, totals, function.weight))
    if rest := [p for p in totals.values() if p.gamed and p.probe not in told]:
        yield _gameable(report, TOTAL, rest, *_weight_of(rest, totals, 1.0))


def _pays_anything(name: str, gamed: Sequence[ProbeScore], severity: Severity, why: str) -> Finding:
    return Finding(
        "pays_anything",
        severity,
        name,
        f"`{name}` pays any text in the right form, whatever it says: {joined([PROBES[p.probe] for p in gamed])} score "
        "nearly as high as the best.",
        why,
        "If it is there for the form, give it a small weight, or pay the form only together with a right answer.",
    )


def _weight_of(gamed: Sequence[ProbeScore], totals: Mapping[str, ProbeScore], weight: float) -> tuple[Severity, str]:
    """How much it matters, by what the totals of these texts are, and why."""
    if not weight:
        return "note", "Its weight is 0: it is only measured."
    own = [totals[p.probe] for p in gamed if p.probe in totals]
    merit = max((p.merit or 0.0 for p in own), default=None)
    if merit is not None and merit < MOST and not any(p.gamed for p in own):
        return (
            "note",
            f"Their totals go {percent(merit)} of the way to the best: the other functions hold this one back.",
        )
    serious = any((p.reached or 0.0) >= MOST for p in own)
    why = "A model finds such a text and then writes nothing else: rewards rise, answers get worse."
    return "serious" if serious else "warning", why


def _gameable(report: Report, name: str, gamed: Sequence[ProbeScore], severity: Severity, why: str) -> Finding:
    parts = [f"{PROBES[p.probe]} ({round((p.reached or 0.0) * p.rows)} of {p.rows} rows)" for p in gamed]
    widest = max(gamed, key=lambda p: p.reached or 0.0)
    ends = report.ends.get(name)
    best = f" ({number(ends[1])})" if ends else ""
    return Finding(
        "gameable",
        severity,
        name,
        f"`{name}` scores nearly as high as the best{best} for {joined(parts)}; "
        f"in row {widest.row} for {quoted(widest.text, EXCERPT)}.",
        why,
        " ".join(dict.fromkeys(INSTEAD[p.probe] for p in gamed)),
    )


def reference_missed(report: Report) -> Iterator[Finding]:
    """In most rows a column of the row is the right answer, but not in all."""
    for function in report.functions:
        for probe in report.probes_of(function.name):
            reached = probe.reached or 0.0
            if probe.probe == REFERENCE and MOST <= reached < 1 and not function.differing:
                missed = probe.rows - round(reached * probe.rows)
                yield Finding(
                    "reference_missed",
                    "warning",
                    function.name,
                    f"`{function.name}` does not reward the row's own answer in {missed} of {probe.rows} rows, "
                    f"the first of them row {probe.missed}; in the others it does.",
                    "No completion can be right there, however good it is.",
                    "Compare the columns of those rows with what the function makes of them: signs, commas, units.",
                )
