"""Real reward functions, run by the pool over rows like those of GSM8K: which findings each one gets."""

import textwrap
from typing import Any

import pytest

from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ConfigError, RewardPoolError
from rewardsmith.rewards.pool import Group
from rewardsmith.rewards.workbench.examine import examine
from rewardsmith.rewards.workbench.faults import Origin
from rewardsmith.rewards.workbench.measures import TOTAL
from rewardsmith.rewards.workbench.report import FunctionReport, ProbeScore, Report
from rewardsmith.wire import RevisionFunction

GOOD = '''
def good(prompt, completion, example):
    """The number behind the last ####."""
    import re

    numbers = re.findall(r"#### (-?[0-9.]+)", completion)
    return float(bool(numbers) and numbers[-1] == example["answer"])
'''
LENIENT = """
def lenient(prompt, completion, example):
    return float(example["answer"] in completion)
"""
CONSTANT = "def constant(prompt, completion, example): return 0.5"
RAISING = """
def raising(prompt, completion, example):
    import re

    number = re.search(r"#### (.*)", completion).group(1)
    return float(number == example["answer"])
"""
SLOW = """
def slow(prompt, completion, example):
    import time

    time.sleep(0.01)
    return float(completion.endswith(example["answer"]))
"""
RANDOM = """
def chance(prompt, completion, example):
    import random

    return random.random()
"""
TAGS = """
def tags(prompt, completion, example):
    return min(1.0, 0.25 * sum(completion.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")))
"""
ROWS = [
    {"prompt": f"A shelf has {n} boards with {n + 3} books each. How many?", "answer": str(n * (n + 3))}
    for n in range(31, 37)
]


def completions_of(row: dict[str, Any]) -> list[str]:
    """Two right ones and two wrong ones, one of these without a mark."""
    right = row["answer"]
    return [f"I multiply.\n#### {right}", f"#### {right}", "#### 7", f"It is {int(right) + 1}, I think."]


def named(text: str, **settings: Any) -> RevisionFunction:
    source = textwrap.dedent(text).strip()
    return RevisionFunction(name=source[4 : source.index("(")], source=source, source_sha256="", **settings)


def examined(*texts: str | RevisionFunction, **settings: Any) -> Report:
    functions = [text if isinstance(text, RevisionFunction) else named(text) for text in texts]
    groups = settings.pop("groups", [Group(row["prompt"], row, completions_of(row)) for row in ROWS])
    return examine(functions, groups, config=settings.pop("config", config()), **settings)


def config(**settings: Any) -> GRPOConfig:
    return GRPOConfig(**{"num_generations": 4, "effective_batch_size": 8, **settings})


def kinds(report: Report) -> list[tuple[str, str, str | None]]:
    return [(finding.kind, finding.severity, finding.function) for finding in report.findings]


def only(report: Report) -> FunctionReport:
    (function,) = report.functions
    return function


def probe(report: Report, function: str, kind: str) -> ProbeScore:
    (found,) = [p for p in report.probes_of(function) if p.probe == kind]
    return found


def test_a_good_reward() -> None:
    report = examined(GOOD)
    assert kinds(report) == []
    assert (report.rows, report.completions, only(report).outcomes) == (6, 24, {"ok": 24})
    scores = only(report).scores
    assert (scores.mean, scores.lowest, scores.highest, scores.constant_groups) == (0.5, 0.0, 1.0, 0.0)
    assert scores.spread == pytest.approx((1 / 3) ** 0.5)
    assert (scores.no_signal, scores.basis) == (0.0, "measured")
    assert report.total == scores
    assert probe(report, "good", "reference").reached == 1.0
    assert [probe(report, "good", kind).mean for kind in ("empty", "echo", "hidden", "listed", "long")] == [0.0] * 5


def test_an_answer_anywhere_can_be_hidden_among_others() -> None:
    report = examined(LENIENT)
    assert kinds(report) == [("gameable", "serious", "lenient")]
    assert [p.probe for p in report.probes_of("lenient") if p.gamed] == ["hidden", "listed"]
    assert "(6 of 6 rows)" in report.findings[0].what


def test_a_constant() -> None:
    assert kinds(examined(CONSTANT)) == [("constant", "serious", "constant")]


def test_errors_are_folded_with_the_users_line() -> None:
    report = examined(RAISING, origins={"raising": Origin("rewards.py", 10)})
    # It fails on one completion of four; right answers in the form it wants earn what they should.
    assert kinds(report) == [("failing", "serious", "raising")]
    (fault,) = only(report).faults
    assert (fault.count, fault.outcome, fault.where, fault.row) == (6, "exception", "rewards.py, line 13", 0)
    assert fault.error.startswith("AttributeError") and fault.completion == completions_of(ROWS[0])[3]
    assert only(report).outcomes == {"ok": 18, "exception": 6}


def test_a_slow_one() -> None:
    report = examined(SLOW, config=config(effective_batch_size=20_000))
    assert kinds(report) == [("slow", "warning", "slow")]
    assert only(report).seconds.p50 >= 0.01
    assert report.seconds_per_step >= 20_000 * 0.01 / report.workers


def test_a_random_one() -> None:
    groups = [Group(row["prompt"], row, [f"#### {n}" for n in range(32)]) for row in ROWS]
    report = examined(RANDOM, groups=groups)
    assert kinds(report) == [("not_repeatable", "serious", "chance")]
    assert only(report).differing == 1.0


def test_tags_without_content() -> None:
    groups = [
        Group(
            row["prompt"],
            row,
            [
                f"<think>a</think>\n<answer>{row['answer']}</answer>\n#### {row['answer']}",
                "<answer>7</answer>\n#### 7",
                f"#### {row['answer']}",
                "no",
            ],
        )
        for row in ROWS
    ]
    assert kinds(examined(TAGS, groups=groups)) == [
        ("pays_anything", "serious", "tags"),
        ("gameable", "serious", "tags"),
    ]
    # Beside one that looks at the answer, they are held back.
    report = examined(named(TAGS, weight=0.2), GOOD, groups=groups)
    assert kinds(report) == [("pays_anything", "note", "tags"), ("gameable", "note", "tags")]


def test_functions_of_a_set_are_told_apart_and_the_total_is_their_weighted_sum() -> None:
    against = "def against(prompt, completion, example): return 1 - float(completion.endswith(example['answer']))"
    report = examined(named(GOOD, weight=2.0), named(against, weight=0.5))
    (pair,) = report.agreements
    assert (pair.one, pair.other, pair.groups, pair.correlation) == ("good", "against", 6, pytest.approx(-1.0))
    assert ("disagree", "warning", "good") in kinds(report)
    assert (report.total.mean, report.total.highest, report.total.lowest) == (1.25, 2.0, 0.5)


def test_groups_of_another_size_than_the_job_s() -> None:
    beyond = examined(GOOD, config=config(num_generations=8)).total
    assert beyond.basis == "at most" and beyond.no_signal == pytest.approx(2 * 0.5**8)
    within = examined(GOOD, config=config(num_generations=2)).total
    assert within.basis == "estimated" and within.no_signal == pytest.approx(2 / 6)


def test_hopeless_rows_are_told() -> None:
    groups = [Group(row["prompt"], row, completions_of(row)[2 * (n > 0) :]) for n, row in enumerate(ROWS)]
    report = examined(GOOD, groups=groups, config=config(num_generations=2))
    assert ("no_signal", "serious", None) in kinds(report)


def test_without_completions_the_probes_are_what_there_is() -> None:
    groups = [Group(row["prompt"], row, []) for row in ROWS]
    report = examined(LENIENT, groups=groups)
    assert kinds(report) == [("gameable", "serious", "lenient"), ("no_completions", "note", None)]
    assert only(report).calls == 6 * 6, "all kinds but tags, one form each"
    assert only(report).scores.mean is None and report.total.no_signal is None


def test_groups_of_one_row_are_probed_once() -> None:
    groups = [Group(ROWS[0]["prompt"], ROWS[0], completions_of(ROWS[0])) for _ in range(3)]
    report = examined(GOOD, groups=groups, rows=[5, 5, 5])
    assert (report.rows, report.completions, report.total.groups) == (1, 12, 3)
    assert {p.rows for p in report.probes} == {1} and {p.row for p in report.probes} == {5}


def test_an_error_that_ends_jobs_does_not_end_the_examination() -> None:
    report = examined(named(RAISING, on_error="fail"), GOOD)
    assert ("failing", "serious", "raising") in kinds(report)
    assert 'With on_error="fail" the first of them ends the job' in report.findings[0].why


def test_what_is_left_out_has_no_total() -> None:
    report = examined(named(RAISING, on_error="exclude"))
    assert (report.total.values, report.total.missing) == (18, 6)
    assert ("left_out", "warning", None) in kinds(report)


def test_abstaining_is_no_failure() -> None:
    text = (
        "def maybe(prompt, completion, example): return None if 'think' in completion else 1.0 * len(completion) / 99"
    )
    report = examined(named(text, none="abstain"))
    assert only(report).outcomes == {"ok": 18, "abstain": 6} and only(report).faults == []


def test_a_weight_by_schedule_is_that_of_step_1() -> None:
    report = examined(named(GOOD, schedule={1: 0.5, 100: 2.0}), CONSTANT)
    assert report.functions[0].weight == 0.5 and report.total.highest == 1.0
    assert report.notes == ["Weights change by a schedule (good); those of step 1 count here."]


def test_what_compares_completions_with_each_other_is_not_probed() -> None:
    text = "def rank(prompt, completions, example): return [sorted(completions).index(c) / 3 for c in completions]"
    report = examined(named(text, per="group"))
    assert report.functions[0].scores.mean == 0.5 and report.probes == [] and kinds(report) == []
    assert report.notes == ["Scored by group and therefore not probed: rank."]
    # Beside another one, that one is probed; the total only where it does not count.
    assert {p.function for p in examined(named(text, per="group"), GOOD).probes} == {"good"}
    assert {p.function for p in examined(named(text, per="group", weight=0.0), GOOD).probes} == {"good", TOTAL}


def test_what_cannot_be_examined() -> None:
    with pytest.raises(ConfigError, match="no reward function"):
        examined()
    with pytest.raises(ConfigError, match="no row"):
        examined(GOOD, groups=[])
    with pytest.raises(RewardPoolError, match="no_such_module"):
        examined("def f(prompt, completion, example):\n    import no_such_module\n    return 1.0")


def test_progress_is_announced() -> None:
    said: list[str] = []
    examined(GOOD, notice=said.append)
    assert said[0].startswith("scoring 24 completions and ") and said[0].endswith(" probes with 1 function(s), twice")


def test_the_total_is_probed_as_well() -> None:
    report = examined(named(LENIENT, weight=1.0), named(CONSTANT, weight=0.0))
    assert probe(report, TOTAL, "listed").reached == 1.0
    assert ("constant", "note", "constant") in kinds(report)
