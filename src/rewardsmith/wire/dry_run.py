"""Dry runs as they travel: a change of the reward functions tried on completions that a job has stored. Data only."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rewardsmith.wire.base import Answer
from rewardsmith.wire.revisions import Change, RevisionChange, RevisionDiff

MOST_COMPLETIONS = 4096
MOST_ROWS = 32


class DryRunRequest(RevisionChange):
    """A change to be tried on stored completions: those of the newest `steps` steps, or at least the newest
    `completions`, whole steps each, and the newest ones of the dataset's `rows` (indices from 0).

    Old scores come from the store; with `rescore` the present functions are run again beside the new ones.
    """

    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    completions: Annotated[int, Field(ge=1, le=MOST_COMPLETIONS)] = 256
    rows: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(default_factory=list, max_length=MOST_ROWS)
    rescore: bool = False


class ScoreSummary(Answer):
    """The scores of one function, or the totals, over the completions of a dry run.

    `missing` counts completions without a value, `failed` calls that failed (which may count as 0). Seconds are of
    single calls; None where none is known.
    """

    count: int
    missing: int = 0
    failed: int = 0
    mean: float | None = None
    std: float | None = None
    lowest: float | None = None
    highest: float | None = None
    seconds_p50: float | None = None
    seconds_p95: float | None = None
    seconds_p99: float | None = None
    seconds_max: float | None = None


class Histogram(Answer):
    """`old[i]` and `new[i]` count values from `edges[i]` to `edges[i + 1]`; the last interval has its end."""

    edges: list[float]
    old: list[int]
    new: list[int]


class ScoreComparison(Answer):
    """One function under the old and the new set. `ran`: it was called now; else its stored scores are still right.

    `differing` counts completions whose value is another one, of those that both have scored.
    """

    name: str
    change: Change
    ran: bool = False
    old: ScoreSummary | None = None
    new: ScoreSummary | None = None
    histogram: Histogram | None = None
    differing: int = 0


class SignalForecast(Answer):
    """What the totals mean for training. A group gives no signal when its totals are all the same, or are not there.

    `flipped`: completions that were pushed up and would be pushed down, or the other way round. Totals are taken as
    the reward functions give them: a KL or a punishment of length that is added in training is not in it.
    """

    groups: int
    without_signal_old: int
    without_signal_new: int
    completions: int
    flipped: int


class RowChange(Answer):
    """One completion under both sets. Texts are cut; the whole ones are among the job's completions."""

    step: int
    idx: int
    row: int
    sample: int
    prompt: str
    completion: str
    old: dict[str, float | None]
    new: dict[str, float | None]
    old_total: float | None
    new_total: float | None
    flipped: bool = False


class CallFailure(Answer):
    """Failures of one function that look the same; `error` with its traceback is of the one call that is named."""

    function: str
    outcome: str
    count: int
    error: str
    step: int
    row: int
    sample: int


class DryRun(Answer):
    """What a change would have meant for completions that are there already. Nothing of the job has changed.

    `against` is the revision that the change starts from; `scored_by` are those that gave the old scores. `stopped`
    says why fewer completions were scored than were found, `findings` what to look at, in plain words.
    """

    against: int
    scored_by: list[int]
    diff: RevisionDiff
    first_step: int
    last_step: int
    completions: int
    scored: int
    stopped: str | None = None
    missing_rows: list[int] = Field(default_factory=list)
    seconds: float
    findings: list[str]
    total: ScoreComparison
    functions: list[ScoreComparison]
    signal: SignalForecast
    changes: list[RowChange]
    failures: list[CallFailure]
