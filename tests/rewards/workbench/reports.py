"""Reports made by hand: one with nothing wrong, and parts of it to change."""

from dataclasses import replace
from typing import Any

from rewardsmith.rewards.workbench.faults import Fault
from rewardsmith.rewards.workbench.measures import TOTAL
from rewardsmith.rewards.workbench.probes import PROBES, REFERENCE
from rewardsmith.rewards.workbench.report import FunctionReport, ProbeScore, Report, Scores, Seconds

SCORES = Scores(
    values=160,
    missing=0,
    mean=0.4,
    lowest=0.0,
    highest=1.0,
    spread=0.45,
    groups=10,
    constant_groups=0.1,
    no_signal=0.1,
    basis="measured",
    all_lowest=0.1,
    all_highest=0.0,
)
FAST = Seconds(p50=0.0001, p95=0.0002, p99=0.0004, per_step=0.001)


def fault(count: int, outcome: str = "exception", where: str = "rewards.py, line 7") -> Fault:
    return Fault(outcome, where, "ValueError: no number", count, 3, "none", "Traceback ...")


def function(name: str = "answer", **changes: Any) -> FunctionReport:
    scores = replace(SCORES, **changes.pop("scores", {}))
    made = FunctionReport(
        name=name,
        weight=1.0,
        on_error="zero",
        calls=160,
        outcomes={"ok": 160},
        scores=scores,
        seconds=FAST,
        differing=0.0,
        noise=0.0,
    )
    return replace(made, **changes)


def probes(name: str, **reached: float) -> list[ProbeScore]:
    """Of ten rows; the reference reaches the best in all and no other probe in any, but for those of `reached`."""
    made = []
    for kind in PROBES:
        share = reached.get(kind, 1.0 if kind == REFERENCE else 0.0)
        made.append(
            ProbeScore(
                function=name,
                probe=kind,
                rows=10,
                mean=share,
                highest=float(share > 0),
                merit=share,
                reached=share,
                failed=0,
                error="",
                row=3,
                text=f"text of {kind}",
                missed=None if share == 1 else 8,
            )
        )
    return made


def report(*functions: FunctionReport, **changes: Any) -> Report:
    functions = functions or (function(),)
    made = Report(
        source="completions.jsonl",
        rows=10,
        completions=160,
        group_size=16,
        batch=16,
        workers=2,
        functions=list(functions),
        total=replace(SCORES, **changes.pop("total", {})),
        agreements=[],
        probes=[probe for name in [*(f.name for f in functions), TOTAL] for probe in probes(name)],
        ends={name: (0.0, 1.0) for name in [*(f.name for f in functions), TOTAL]},
    )
    return replace(made, **changes)
