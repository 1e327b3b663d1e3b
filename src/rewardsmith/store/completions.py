"""Completions and reward logs of a job as users ask for them: which columns there are and what each filter means.

They lie in the segments that the job wrote; `segment_search.py` reads them, `reward_logs.py` knows those of the logs.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal

from sqlalchemy import Row

from rewardsmith import wire
from rewardsmith.store import jobrows, reward_logs, segment_search
from rewardsmith.store.artifacts import Artifacts
from rewardsmith.store.database import Database
from rewardsmith.store.segment_search import Order, Search, holds

# What one call gave is a struct in the file and three fields of a row.
COMPLETION_COLUMNS = tuple(name for name in wire.CompletionRow.model_fields if name not in ("outcomes", "seconds"))
ANY_OUTCOME = "list_contains(list_transform(map_values(scores), lambda score: score.outcome), $outcome)"


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
        score = "total_reward" if function is None else "scores[$function].value"
        filters = {
            "step": ("step = $step", step),
            "phase": ("phase = $phase", phase),
            "row": ('"row" = $row', row),
            "function": ("map_contains(scores, $function)", function),
            "outcome": (ANY_OUTCOME if function is None else "scores[$function].outcome = $outcome", outcome),
            "min_score": (f"{score} >= $min_score", min_score),
            "max_score": (f"{score} <= $max_score", max_score),
            "text": (holds("prompt", "completion"), text),
        }
        search = Search("completions", COMPLETION_COLUMNS, ("phase", "idx"), filters, order, after, limit)
        rows, following = self._page(uuid, search)
        return wire.Page(data=[_completion(found) for found in rows], next=following)

    def reward_logs(
        self,
        uuid: str,
        filters: wire.LogFilters,
        *,
        order: Order = "newest",
        after: str | None = None,
        limit: int = 50,
    ) -> wire.Page:
        """`data` holds wire.RewardLogRow as JSON. Raises as above."""
        rows, following = self._page(uuid, reward_logs.search(filters, order, after, limit))
        return wire.Page(data=[_json(wire.RewardLogRow(**found)) for found in rows], next=following)

    def folded_logs(
        self, uuid: str, filters: wire.LogFilters, *, after: str | None = None, limit: int = 50
    ) -> wire.FoldedLogs:
        """Calls that said the same as one, the most frequent first. Raises as above."""
        search = reward_logs.search(filters, "newest", after, limit)
        return reward_logs.fold(self._files(uuid, search), self._artifacts, search)

    def examples(self, uuid: str, rows: Collection[int]) -> dict[int, dict[str, Any]]:
        """Rows of the job's dataset by index, from 0. Raises NotFound, also for a dataset that was deleted since."""
        with self._database.read() as connection:
            path = jobrows.find(connection, uuid).dataset_path
        with self._artifacts.fetch(path).open("rb") as lines:
            return {number: json.loads(line) for number, line in enumerate(lines) if number in rows}

    def _page(self, uuid: str, search: Search) -> tuple[list[dict[str, Any]], str | None]:
        return segment_search.page(self._files(uuid, search), self._artifacts, search)

    def _files(self, uuid: str, search: Search) -> list[Row[Any]]:
        with self._database.read() as connection:
            return segment_search.manifest(connection, jobrows.find(connection, uuid).id, search)


def _completion(row: dict[str, Any]) -> dict[str, Any]:
    scores = row.pop("scores")
    values, outcomes, seconds = (
        {name: score[field] for name, score in scores.items()} for field in ("value", "outcome", "seconds")
    )
    return _json(wire.CompletionRow(**row, scores=values, outcomes=outcomes, seconds=seconds))


def _json(row: wire.CompletionRow | wire.RewardLogRow) -> dict[str, Any]:
    return row.model_dump(mode="json", by_alias=True)
