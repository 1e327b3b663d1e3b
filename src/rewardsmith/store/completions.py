"""Completions and reward logs of a job, read from its segments with DuckDB."""

from __future__ import annotations

from typing import Literal

from rewardsmith import wire
from rewardsmith.store.artifacts import Artifacts
from rewardsmith.store.database import Database

Order = Literal["newest", "oldest"]


class Completions:
    """Filters left None do not filter. A page may be short, even empty, while `next` says there is more to search."""

    def __init__(self, database: Database, artifacts: Artifacts) -> None:
        self._database = database
        self._artifacts = artifacts

    def completions(
        self,
        uuid: str,
        *,
        step: int | None = None,
        phase: Literal["train", "eval"] | None = None,
        row: int | None = None,
        function: str | None = None,
        outcome: str | None = None,
        min_score: float | None = None,
        max_score: float | None = None,
        text: str | None = None,
        order: Order = "newest",
        after: str | None = None,
        limit: int = 50,
    ) -> wire.Page:
        """`data` holds wire.CompletionRow as JSON. Raises NotFound (job), ConfigError (cursor, limit 1 to 500).

        Scores are totals, or with `function` that function's values; `outcome` is that function's, else any one's.
        `text` is looked for in prompt and completion, in any case.
        """
        raise NotImplementedError

    def reward_logs(
        self,
        uuid: str,
        *,
        function: str | None = None,
        revision: int | None = None,
        step: int | None = None,
        outcome: str | None = None,
        text: str | None = None,
        order: Order = "newest",
        after: str | None = None,
        limit: int = 50,
    ) -> wire.Page:
        """`data` holds wire.RewardLogRow as JSON. `text` is looked for in prints and errors."""
        raise NotImplementedError
