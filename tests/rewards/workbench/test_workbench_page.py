"""The page: its lines as they are, its width, and that no text of a row or a model steers the terminal."""

import json
from dataclasses import asdict, replace

from reports import SCORES, fault, function, probes, report

from rewardsmith.rewards.workbench import page
from rewardsmith.rewards.workbench.findings import find
from rewardsmith.rewards.workbench.measures import TOTAL
from rewardsmith.rewards.workbench.page import GAMED_MARK, WIDTH
from rewardsmith.rewards.workbench.report import Agreement, Report, show


def examined(found: Report) -> Report:
    return replace(found, findings=find(found))


def texts(found: Report) -> list[str]:
    return [line.text.rstrip() for line in page.lines(found)]


FOUND = examined(
    report(
        function("format", weight=0.2),
        function(faults=[fault(2)]),
        agreements=[Agreement("format", "answer", 0.25, 8)],
        probes=[*probes("format", tags=1.0), *probes("answer"), *probes(TOTAL)],
    )
)


def test_the_page_as_it_is(capsys) -> None:
    assert texts(FOUND) == [
        "2 reward functions, 10 rows, 160 completions (completions.jsonl)",
        "",
        "Scores                        weight      mean    lowest   highest    spread  constant no signal",
        "  format                         0.2      0.40      0.00      1.00      0.45      10 %      10 %",
        "  answer                           1      0.40      0.00      1.00      0.45      10 %      10 %",
        "  total_reward                            0.40      0.00      1.00      0.45      10 %      10 %",
        "    spread: mean standard deviation within groups. constant: groups whose scores are all the same.",
        "    no signal: share of such groups if they have 16 completions, as measured.",
        "",
        "Calls                          calls    failed differing       p50       p95       p99    a step",
        "  format                         160       0 %       0 %    100 µs    200 µs    400 µs    1.0 ms",
        "  answer                         160       1 %       0 %    100 µs    200 µs    400 µs    1.0 ms",
        "    differing: scored otherwise the second time. a step: 16 completions x mean seconds / 2 workers,",
        "    2.0 ms in all.",
        "  answer: 2 x exception at rewards.py, line 7: ValueError: no number",
        '    first in row 3, for "none"',
        "",
        "Agreement                   rank correlation            groups",
        "  format, answer                       +0.25                 8",
        "",
        "Probes                         empty      echo    hidden    listed      long      tags reference",
        "  format                        0.00      0.00      0.00      0.00      0.00    ! 1.00      1.00",
        "  answer                        0.00      0.00      0.00      0.00      0.00      0.00      1.00",
        "  total_reward                  0.00      0.00      0.00      0.00      0.00      0.00      1.00",
        "    Mean score of such texts, the best of each row. ! nearly as high as the best. empty: an empty",
        "    answer; echo: the prompt again; hidden: prose that names the right answer among wrong ones;",
        "    listed: all candidate answers, one after another; long: a very long text that says nothing;",
        "    tags: the tags and marks of the source, over and over; reference: the row's own columns as the",
        "    answer.",
        "",
        "2 findings, the most serious first",
        "",
        "1. WARNING: `answer` fails in 2 of 160 calls: 2 x exception at rewards.py, line 7, ValueError: no",
        "   number.",
        "   Why: A failed call counts as 0, as a wrong answer does, and right answers may be among them.",
        "   Change: See rewards.py, line 7. A completion is any text: return 0.0 where it cannot be read.",
        "",
        "2. NOTE: `format` scores nearly as high as the best (1.00) for the tags and marks of the source,",
        '   over and over (10 of 10 rows); in row 3 for "text of tags".',
        "   Why: Their totals go 0 % of the way to the best: the other functions hold this one back.",
        "   Change: Ask for each tag exactly once, in order, with something in it.",
    ]
    show(FOUND)
    assert capsys.readouterr().out.rstrip().splitlines() == [line.rstrip() for line in str(FOUND).splitlines()]


def test_no_line_is_wider_than_the_page() -> None:
    wide = function(
        "a_name_of_a_reward_function_that_is_longer_than_anybody_should_write",
        weight=-123456.789,
        scores={"mean": -1e11, "lowest": -1e12, "highest": 1e12, "spread": 1e12},
        faults=[replace(fault(1), error="x" * 500, completion="y" * 500, where="z" * 90)],
    )
    found = examined(replace(report(wide, function()), notes=["w " * 200], source="s" * 300))
    assert max(map(len, texts(found))) <= WIDTH


def test_what_nobody_should_miss_is_said_without_colour() -> None:
    assert any(f"{GAMED_MARK} 1.00" in line for line in texts(FOUND))
    assert {"WARNING:", "NOTE:"} <= {word for line in texts(FOUND) for word in line.split()}


def test_texts_of_models_cannot_steer_the_terminal() -> None:
    evil = "\x1b[2J\rgone\nnext\u202e"
    found = examined(
        report(
            function(faults=[replace(fault(1), error=evil, completion=evil)]),
            probes=[replace(probe, text=evil) for probe in probes("answer", empty=1.0)],
            notes=[evil],
        )
    )
    assert all(text.isprintable() for text in texts(found))
    assert not any("\u202e" in text for text in texts(found))


def test_without_completions_and_without_findings() -> None:
    empty = replace(SCORES, values=0, mean=None, groups=0)
    page_of_probes = texts(report(completions=0, total=vars(empty)))
    assert page_of_probes[0] == "1 reward function, 10 rows, no completions"
    assert not [line for line in page_of_probes if line.startswith("  Scores")]
    assert "Nothing was found." in page_of_probes


def test_how_well_it_is_known_is_told() -> None:
    def basis(word: str | None) -> str:
        return " ".join(texts(report(total={"basis": word})))

    assert "as measured" in basis("measured")
    assert "by all the ways of taking 16" in " ".join(basis("estimated").split())
    assert "at most: the sum over the different scores of (their share of the group)^16" in " ".join(
        basis("at most").split()
    )
    assert "not known" in basis(None)


def test_a_report_is_plain_json() -> None:
    assert json.loads(json.dumps(asdict(FOUND)))["functions"][1]["faults"][0]["where"] == "rewards.py, line 7"
