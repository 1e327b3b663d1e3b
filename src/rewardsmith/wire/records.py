"""What a run leaves behind, as it is read: metrics, completions, reward logs. Data only."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rewardsmith.wire.base import Answer


class MetricPoint(Answer):
    step: int
    value: float


class CompletionRow(Answer):
    """One stored completion. `scores` maps function to its value, None where the function gave none; `seconds` to the
    wall time of the call."""

    step: int
    idx: int
    epoch: float
    phase: Literal["train", "eval"]
    row: int
    sample: int
    prompt: str
    completion: str
    total_reward: float | None
    advantage: float | None
    finish_reason: str
    tokens: int
    revision: int
    policy_version: int
    scores: dict[str, float | None]
    outcomes: dict[str, str]
    seconds: dict[str, float] = Field(default_factory=dict)


class RewardLogRow(Answer):
    """One call of one function: what it gave, how long it took, what it printed, how it failed."""

    step: int
    idx: int
    epoch: float
    phase: Literal["train", "eval"]
    row: int
    sample: int
    function: str
    revision: int
    outcome: str
    value: float | None
    seconds: float
    prints: str
    error: str


CallOutcome = Literal[
    "ok",
    "not_a_number",
    "exception",
    "timeout",
    "crash",
    "out_of_memory",
    "output_limit",
    "abstain",
    "infrastructure",
]
Number = Annotated[int, Field(ge=0, lt=2**31)]


class LogFilters(BaseModel):
    """Which calls of a reward log are asked for; what is None does not filter.

    `from_step` and `to_step` are both included. `epoch` is a pass over the rows, counted from 1. `text` is looked for
    in prints and errors, in any case. Without `every`, only calls that printed something or failed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    function: str | None = None
    revision: Number | None = None
    step: Number | None = None
    from_step: Number | None = None
    to_step: Number | None = None
    epoch: Number | None = None
    phase: Literal["train", "eval"] | None = None
    outcome: CallOutcome | None = None
    text: str | None = None
    every: bool = False


class FoldedLog(Answer):
    """Calls that said the same but for numbers. `gist` is the line that names the error, else the first one printed."""

    function: str
    revision: int
    outcome: str
    gist: str
    count: int
    first_step: int
    last_step: int
    example: RewardLogRow


class FoldedLogs(Answer):
    """The most frequent ones first. `others` counts calls that are in none of them.

    `next` goes back as `after` to fold the older part of the log too: a fold of both parts adds the counts up.
    """

    data: list[FoldedLog]
    others: int = 0
    next: str | None = None


class Page(Answer):
    """`next` goes back as `after` to read on; None at the end."""

    data: list[dict[str, Any]]
    next: str | None = None
