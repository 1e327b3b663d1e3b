"""Every finding appears where it should, as serious as it should be, and nowhere else."""

from dataclasses import replace
from typing import Any

import pytest
from reports import FAST, fault, function, probes, report

from rewardsmith.rewards.workbench.findings import find
from rewardsmith.rewards.workbench.measures import TOTAL
from rewardsmith.rewards.workbench.probes import PROBES
from rewardsmith.rewards.workbench.report import Agreement, ProbeScore, Report

CONSTANT = {"lowest": 0.5, "highest": 0.5, "spread": 0.0, "constant_groups": 1.0, "no_signal": 1.0}


def told(found: Report) -> list[tuple[str, str, str | None]]:
    return [(finding.kind, finding.severity, finding.function) for finding in find(found)]


def gamed(of_function: dict[str, float], of_total: dict[str, float], **changes: Any) -> Report:
    return report(function(**changes), probes=[*probes("answer", **of_function), *probes(TOTAL, **of_total)])


def test_a_good_reward_has_no_findings() -> None:
    assert find(report()) == []
    assert find(report(function(), function("format", weight=0.2))) == []


def test_findings_say_what_why_and_what_to_change() -> None:
    (finding,) = find(report(function(faults=[fault(40), fault(1, "timeout", "")])))
    assert finding.what == (
        "`answer` fails in 41 of 160 calls: 40 x exception at rewards.py, line 7, ValueError: no number; "
        "1 x timeout, ValueError: no number."
    )
    assert finding.why.startswith("A failed call counts as 0") and "the job pauses" in finding.why
    assert finding.change == ("See rewards.py, line 7. A completion is any text: return 0.0 where it cannot be read.")


def test_the_most_serious_comes_first() -> None:
    found = report(
        function(scores={"highest": 3.0}), function("broken", faults=[fault(160)]), function("x", differing=0.1)
    )
    assert [finding.severity for finding in find(found)] == ["serious", "warning", "note"]


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({"faults": [fault(1)]}, "warning"),
        ({"faults": [fault(32)]}, "warning"),
        ({"faults": [fault(33)]}, "serious"),
        ({"faults": [fault(1)], "on_error": "fail"}, "serious"),
        ({"faults": [fault(1, "crash", "")], "on_error": "exclude"}, "warning"),
    ],
)
def test_failing(changes: dict[str, Any], severity: str) -> None:
    assert told(report(function(**changes))) == [("failing", severity, "answer")]


def test_a_function_that_always_fails_is_not_also_called_constant() -> None:
    assert told(report(function(faults=[fault(160)], scores={**CONSTANT}))) == [("failing", "serious", "answer")]


def test_failing_on_probes_only() -> None:
    broken = [replace(p, failed=2, error="IndexError: no word") if p.probe == "empty" else p for p in probes("answer")]
    found = report(probes=[*broken, *probes(TOTAL)])
    assert told(found) == [("failing_on_probes", "warning", "answer")]
    assert "fails on an empty answer: IndexError: no word." in find(found)[0].what
    assert told(replace(found, functions=[function(faults=[fault(1)])])) == [("failing", "warning", "answer")]


@pytest.mark.parametrize(
    ("lowest", "on_error", "faults", "severity"),
    [
        (-1.0, "zero", [], "note"),
        (-1.0, "zero", [fault(1)], "warning"),
        (-1.0, "exclude", [], None),
        (0.0, "zero", [], None),
    ],
)
def test_failure_pays(lowest: float, on_error: str, faults: list[Any], severity: str | None) -> None:
    found = report(function(on_error=on_error, faults=faults, scores={"lowest": lowest}))
    assert [s for kind, s, _ in told(found) if kind == "failure_pays"] == [severity] * bool(severity)


@pytest.mark.parametrize(("seconds", "severity"), [(0.99, None), (1.0, "note"), (9.9, "note"), (10.0, "warning")])
def test_slow(seconds: float, severity: str | None) -> None:
    slow = function("judge", seconds=replace(FAST, per_step=seconds - 0.001))
    assert told(report(function(), slow)) == [("slow", severity, "judge")] * bool(severity)


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({"differing": 0.01, "noise": 0.49}, "warning"),
        ({"differing": 0.01, "noise": 0.5}, "serious"),
        ({"differing": 0.5, "noise": None}, "warning"),
        ({"differing": 0.5, "noise": 1.0, "weight": 0.0}, "note"),
    ],
)
def test_not_repeatable(changes: dict[str, Any], severity: str) -> None:
    assert told(report(function(**changes))) == [("not_repeatable", severity, "answer")]


def test_constant() -> None:
    total = {"no_signal": 1.0}
    (finding,) = find(report(function(scores=CONSTANT), total=total))
    assert (finding.kind, finding.severity) == ("constant", "serious")
    assert "gives 0.50 to every completion; one of the row's own columns as the answer gets up to 1.00" in finding.what
    assert told(report(function(scores=CONSTANT, weight=0.0), total=total)) == [("constant", "note", "answer")]
    assert told(report(function(scores={**CONSTANT, "values": 1}))) == [], "one completion says nothing"


def test_a_constant_that_is_the_best_there_is_is_no_harm() -> None:
    found = report(function(scores={**CONSTANT, "lowest": 1.0, "highest": 1.0}))
    assert told(found) == [("constant", "note", "answer")]
    assert "1.00 to every completion, which is its best: an empty answer gets 0.00" in find(found)[0].what


def test_a_constant_that_no_text_changes() -> None:
    same = [replace(p, mean=0.5, highest=0.5, reached=None) for p in probes("answer")]
    (finding,) = find(report(function(scores=CONSTANT), probes=same))
    assert finding.what == "`answer` gives 0.50 to every completion, and to every probe."
    without = report(function(scores={"values": 0, "lowest": None, "highest": None}), probes=same, completions=0)
    assert next((f.kind, f.what) for f in find(without)) == (
        "constant",
        "`answer` gives 0.50 to every probe, the row's own columns among them.",
    )


@pytest.mark.parametrize(
    ("total", "severity"),
    [
        ({"no_signal": 0.49}, None),
        ({"no_signal": 0.5}, "warning"),
        ({"no_signal": 0.8}, "serious"),
        ({"no_signal": 0.9, "basis": "at most"}, "warning"),
        ({"no_signal": None, "basis": None}, None),
    ],
)
def test_no_signal(total: dict[str, Any], severity: str | None) -> None:
    assert told(report(total=total)) == [("no_signal", severity, None)] * bool(severity)


def test_groups_that_are_all_right_ask_for_another_change_than_those_all_wrong() -> None:
    (wrong,) = find(report(total={"no_signal": 0.9, "all_lowest": 0.9, "all_highest": 0.0}))
    (right,) = find(report(total={"no_signal": 0.9, "all_lowest": 0.0, "all_highest": 0.9}))
    assert "easier rows" in wrong.change and "solved already" in right.change
    assert "90 % have nothing but the lowest total, 0 % nothing but the highest" in wrong.what


@pytest.mark.parametrize(("missing", "there"), [(31, False), (32, True)])
def test_left_out(missing: int, there: bool) -> None:
    total = {"values": 160 - missing, "missing": missing}
    assert told(report(total=total)) == [("left_out", "warning", None)] * there


def test_out_of_range() -> None:
    assert told(report(function(scores={"highest": 2.0}))) == [("out_of_range", "note", "answer")]
    assert told(report(function(scores={"lowest": -0.1}, on_error="exclude"))) == [("out_of_range", "note", "answer")]
    large = function("length", scores={"highest": 9.0, "spread": 4.5})
    found = report(function(), large)
    assert told(found) == [("out_of_range", "warning", "length")] and "that of `answer`" in find(found)[0].why
    assert told(report(function(), replace(large, weight=0.01))) == [("out_of_range", "note", "length")]
    assert told(report(function(weight=0.0), large)) == [("out_of_range", "note", "length")]


@pytest.mark.parametrize(
    ("correlation", "groups", "weight", "there"),
    [
        (-0.3, 3, 1.0, True),
        (-0.29, 3, 1.0, False),
        (-0.9, 2, 1.0, False),
        (None, 0, 1.0, False),
        (-0.9, 9, 0.0, False),
        (-0.9, 9, -1.0, False),
        (0.9, 9, -1.0, True),
    ],
)
def test_disagree(correlation: float | None, groups: int, weight: float, there: bool) -> None:
    pair = Agreement("answer", "short", correlation, groups)
    found = report(function(), function("short", weight=weight), agreements=[pair])
    assert told(found) == [("disagree", "warning", "answer")] * there


@pytest.mark.parametrize("kind", [kind for kind in PROBES if kind != "reference"])
def test_gameable(kind: str) -> None:
    found = gamed({kind: 1.0}, {kind: 1.0})
    assert told(found) == [("gameable", "serious", "answer")]
    assert f"{PROBES[kind]} (10 of 10 rows)" in find(found)[0].what and f'"text of {kind}"' in find(found)[0].what


@pytest.mark.parametrize(
    ("of_function", "of_total", "changes", "severity"),
    [
        ({"listed": 0.09}, {"listed": 0.09}, {}, None),
        ({"listed": 0.1}, {"listed": 0.1}, {}, "warning"),
        ({"listed": 1.0}, {"listed": 0.49}, {}, "warning"),
        ({"listed": 1.0}, {"listed": 0.5}, {}, "serious"),
        ({"listed": 1.0}, {"listed": 0.0}, {}, "note"),
        ({"listed": 1.0}, {"listed": 1.0}, {"weight": 0.0}, "note"),
    ],
)
def test_how_serious_gaming_is_goes_by_the_total(
    of_function: dict[str, float], of_total: dict[str, float], changes: dict[str, Any], severity: str | None
) -> None:
    assert told(gamed(of_function, of_total, **changes)) == [("gameable", severity, "answer")] * bool(severity)


def test_who_pays_for_the_form_alone_is_told_once() -> None:
    anything = dict.fromkeys(("echo", "hidden", "listed", "long"), 1.0)
    assert told(gamed(anything, {})) == [("pays_anything", "note", "answer")]
    assert told(gamed(anything, anything)) == [("pays_anything", "serious", "answer")]
    assert told(gamed({**anything, "tags": 1.0}, {"tags": 0.2})) == [
        ("gameable", "warning", "answer"),
        ("pays_anything", "note", "answer"),
    ]
    assert told(gamed({"echo": 1.0}, {})) == [("gameable", "note", "answer")]


def test_half_of_the_total_is_worth_a_warning() -> None:
    totals = [replace(p, merit=0.5) if p.probe == "listed" else p for p in probes(TOTAL)]
    assert told(report(probes=[*probes("answer", listed=1.0), *totals])) == [("gameable", "warning", "answer")]
    held_back = [replace(p, merit=0.49) if p.probe == "listed" else p for p in probes(TOTAL)]
    (finding,) = find(report(probes=[*probes("answer", listed=1.0), *held_back]))
    assert finding.severity == "note" and "go 49 % of the way to the best" in finding.why


def test_a_total_can_be_gamed_where_no_function_is() -> None:
    assert told(gamed({}, {"tags": 1.0})) == [("gameable", "serious", TOTAL)]


def test_what_scores_by_chance_is_not_called_gameable() -> None:
    assert told(gamed({"empty": 1.0}, {"empty": 1.0}, differing=0.4, noise=0.9)) == [
        ("not_repeatable", "serious", "answer")
    ]


def test_right_answers_are_no_gaming_and_their_loss_is_told() -> None:
    assert told(gamed({"reference": 1.0}, {"reference": 1.0})) == []
    found = gamed({"reference": 0.8}, {"reference": 0.8})
    assert told(found) == [("reference_missed", "warning", "answer")]
    assert "in 2 of 10 rows, the first of them row 8" in find(found)[0].what
    # In most rows no column is an answer: then the rows are of another kind, and nothing was missed.
    assert told(gamed({"reference": 0.4}, {"reference": 0.4})) == []


def test_what_is_not_known_is_no_finding() -> None:
    def unknown(probe: ProbeScore) -> ProbeScore:
        return replace(probe, mean=None, highest=None, merit=None, reached=None)

    assert find(report(probes=[unknown(probe) for probe in [*probes("answer"), *probes(TOTAL)]])) == []


def test_calls_without_a_result() -> None:
    found = report(function(outcomes={"ok": 158, "infrastructure": 2}))
    assert told(found) == [("infrastructure", "warning", "answer")]


def test_what_rests_on_little_says_so() -> None:
    assert told(report(total={"groups": 4})) == [("few_groups", "note", None)]
    assert told(report(completions=0)) == [("no_completions", "note", None)]
