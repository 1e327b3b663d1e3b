"""What an examination found, as plain data: `str(report)` is the page, `dataclasses.asdict(report)` is JSON.

None stands for what is not known, never for 0. Shares are from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rewardsmith.rewards.workbench import page
from rewardsmith.rewards.workbench.faults import Fault
from rewardsmith.rewards.workbench.measures import Basis, Value, same
from rewardsmith.rewards.workbench.probes import REFERENCE

Severity = Literal["serious", "warning", "note"]
GAMED_SHARE = 0.1  # of the rows: fewer can be chance
SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "note")


@dataclass(frozen=True)
class Scores:
    """The values of one function, or of the total, on the completions.

    `spread` is the mean standard deviation within groups. Of `groups`, those with two completions or more,
    `constant_groups` is the share that teaches nothing; `no_signal` is that share forecast for groups of the job's
    size, and `basis` how well it is known. `all_lowest` and `all_highest`: groups with nothing but the lowest, the
    highest value of all.
    """

    values: int
    missing: int
    mean: Value = None
    lowest: Value = None
    highest: Value = None
    spread: Value = None
    groups: int = 0
    constant_groups: Value = None
    no_signal: Value = None
    basis: Basis | None = None
    all_lowest: Value = None
    all_highest: Value = None


@dataclass(frozen=True)
class Seconds:
    """Wall time of a call. `per_step`: of all its calls in one step, on this machine's workers."""

    p50: float
    p95: float
    p99: float
    per_step: float


@dataclass(frozen=True)
class FunctionReport:
    """One function. Calls, outcomes, times and faults are those of the completions, or of the probes where there are
    none. `weight` is that of step 1.

    `differing` is the share of calls that said something else the second time, `noise` the share of the variance
    within groups that is chance.
    """

    name: str
    weight: float
    on_error: str
    calls: int
    outcomes: dict[str, int]
    scores: Scores
    seconds: Seconds
    differing: float
    noise: Value = None
    faults: list[Fault] = field(default_factory=list)

    @property
    def failures(self) -> int:
        return sum(fault.count for fault in self.faults)

    @property
    def constant(self) -> Value:
        """The one value of a function that gave the same to two completions or more."""
        lowest, highest = self.scores.lowest, self.scores.highest
        if lowest is None or highest is None or self.scores.values < 2 or not same(lowest, highest):
            return None
        return lowest


@dataclass(frozen=True)
class Agreement:
    """Rank correlation within groups, on the `groups` in which both functions vary; None without any."""

    one: str
    other: str
    correlation: Value
    groups: int


@dataclass(frozen=True)
class ProbeScore:
    """What one function, or the total, gave for one kind of probe: in each of `rows` rows the best of its texts counts.

    `merit` is the mean of how far these get on the way from the lowest score to the best (`measures.ends`), `reached`
    the share of rows that get nearly all the way; None where there is nothing to compare with. `row` and `text` are
    the first that did, else the first of all; `missed` is the first row that did not. `failed` counts calls, `error`
    is of the first of them.
    """

    function: str
    probe: str
    rows: int
    mean: Value
    highest: Value
    merit: Value
    reached: Value
    failed: int
    error: str
    row: int
    text: str
    missed: int | None = None

    @property
    def gamed(self) -> bool:
        """Whether this is a text without merit that earns as much as the best, and not by chance."""
        return self.probe != REFERENCE and (self.reached or 0.0) >= GAMED_SHARE


@dataclass(frozen=True)
class Finding:
    """`kind` is a stable name for programs; `function` is None when it is about the whole set."""

    kind: str
    severity: Severity
    function: str | None
    what: str
    why: str
    change: str


@dataclass(frozen=True)
class Report:
    """`ends` are the lowest and the best score by function, between which probes are measured. `batch` counts
    completions.
    """

    source: str
    rows: int
    completions: int
    group_size: int
    batch: int
    workers: int
    functions: list[FunctionReport]
    total: Scores
    agreements: list[Agreement]
    probes: list[ProbeScore]
    ends: dict[str, tuple[float, float] | None]
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float:
        return sum(function.seconds.per_step for function in self.functions)

    @property
    def weighted(self) -> list[FunctionReport]:
        """The functions that count; those of weight 0 are only measured."""
        return [function for function in self.functions if function.weight]

    def probes_of(self, function: str) -> list[ProbeScore]:
        return [probe for probe in self.probes if probe.function == function]

    def __str__(self) -> str:
        return "\n".join(line.text for line in page.lines(self))


def show(report: Report) -> None:
    """Print the page."""
    print(report)
