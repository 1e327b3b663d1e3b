"""Revisions of a job's reward functions as they travel: what one is, how two differ, how a change is asked for.

Data, and what follows from it alone. A revision never changes; only when it took effect, or why it was refused, is
noted beside it.
"""

from __future__ import annotations

from bisect import bisect_right
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from rewardsmith.wire.base import Answer, Request

# For so many steps the functions that a revision changed or took out go on being scored, with weight 0: as many as
# there are between two checkpoints by default, and enough to tell two curves from each other's noise.
COMPARED_STEPS = 20
MOST_COMPARED_STEPS = 1000
LONGEST_NOTE = 2000

Change = Literal["added", "removed", "changed", "same"]


class RevisionFunction(Answer):
    """One function of a revision. Where there is a `schedule`, it says the weight of each step, and `weight` nothing.

    `schedule` names steps of the job, counted from 1, and the weight at each; see `weight_at`.
    """

    name: str
    source: str
    source_sha256: str
    weight: float = 1.0
    schedule: dict[int, float] | None = None
    on_error: Literal["zero", "exclude", "fail"] = "zero"
    none: Literal["error", "abstain"] = "error"
    per: Literal["completion", "group"] = "completion"

    def weight_at(self, step: int) -> float:
        """In a straight line between two steps of the schedule, level before its first and after its last one."""
        if not self.schedule:
            return self.weight
        knots = sorted(self.schedule.items())
        beyond = bisect_right([at for at, _ in knots], step)
        if beyond in (0, len(knots)):
            return knots[min(beyond, len(knots) - 1)][1]
        (begin, low), (end, high) = knots[beyond - 1 : beyond + 1]
        return low + (high - low) * (step - begin) / (end - begin)

    @property
    def settings(self) -> dict[str, Any]:
        """All but its name and its text, as JSON."""
        return self.model_dump(mode="json", exclude={"name", "source", "source_sha256"})

    def scores_like(self, other: RevisionFunction) -> bool:
        """Whether the scores of one are those of the other: they differ in nothing but how much they weigh."""
        weighing = {"weight", "schedule"}
        return self.model_dump(exclude=weighing) == other.model_dump(exclude=weighing)


class Revision(Answer):
    """An immutable set of reward functions. `effective_step` is the first step scored by it, None until then.

    `sha256` is of its sources and settings: two revisions that have the same one are the same functions.
    `replaces` is the revision that was in effect before it. For `compared_steps` steps, what it changed or took out
    of that one goes on being scored, with weight 0, so that the old curves can be compared with the new ones.
    """

    revision: int
    created_at: datetime
    created_by: str
    note: str | None = None
    sha256: str = ""
    replaces: int | None = None
    effective_step: int | None = None
    refused: str | None = None
    compared_steps: int = 0
    functions: list[RevisionFunction]
    runtime: dict[str, Any] = Field(default_factory=dict)

    def scores_like(self, other: Revision) -> bool:
        """Whether every function gives the scores that it gives in the other: nothing but weights differs."""
        theirs = {function.name: function for function in other.functions}
        return (
            self.runtime == other.runtime
            and {function.name for function in self.functions} == theirs.keys()
            and all(function.scores_like(theirs[function.name]) for function in self.functions)
        )


class RevisionChange(Request):
    """How the present set is to change; whatever is not named stays as it is.

    `functions`, as in `rewardFns.functions`, are added, or take the place of those of the same name, from which they
    inherit the settings that they leave out. `remove` names functions to take out. `weights` has a number or a
    schedule, `{step: weight}`, by name. `runtime` has fields of `rewardFns.runtime`.
    """

    functions: dict[str, Any] = Field(default_factory=dict)
    remove: list[str] = Field(default_factory=list)
    weights: dict[str, float | dict[int, float]] = Field(default_factory=dict)
    runtime: dict[str, Any] = Field(default_factory=dict)


class RevisionRequest(RevisionChange):
    """A change to be made. `compared_steps` None leaves it to the server: COMPARED_STEPS where calls cost nothing."""

    note: str | None = Field(default=None, max_length=LONGEST_NOTE)
    compared_steps: int | None = Field(default=None, ge=0, le=MOST_COMPARED_STEPS)


class RollbackRequest(Request):
    note: str | None = Field(default=None, max_length=LONGEST_NOTE)


class Setting(Answer):
    """One setting that differs; None where it is not set."""

    name: str
    old: Any = None
    new: Any = None


class FunctionDiff(Answer):
    """`source` is a unified diff, empty where the texts are the same."""

    name: str
    change: Change
    source: str = ""
    settings: list[Setting] = Field(default_factory=list)


class RevisionDiff(Answer):
    """From `old` to `new`; a number is None for a set that is no revision (yet). Functions in the order of the new."""

    old: int | None = None
    new: int | None = None
    functions: list[FunctionDiff]
    runtime: list[Setting] = Field(default_factory=list)
