"""Completions and reward logs of a job as users ask for them: which columns there are and what each filter means.

They lie in the segments that the job wrote; `segment_search.py` reads them.
"""

from __future__ import annotations

from typing import Any, Literal

from rewardsmith import wire
from rewardsmith.store import jobrows, segment_search
from rewardsmith.store.artifacts import Artifacts
from rewardsmith.store.database import Database
from rewardsmith.store.segment_search import Order, Search

LOG_COLUMNS = tuple(wire.RewardLogRow.model_fields)
COMPLETION_COLUMNS = tuple(name for name in wire.CompletionRow.model_fields if name != "outcomes")
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
            "text": (_holds("prompt", "completion"), text),
        }
        search = Search("completions", COMPLETION_COLUMNS, ("phase", "idx"), filters, order, after, limit)
        rows, following = self._page(uuid, search)
        return wire.Page(data=[_completion(found) for found in rows], next=following)

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
        """`data` holds wire.RewardLogRow as JSON. `text` is looked for in prints and errors. Raises as above."""
        filters = {
            "function": ('"function" = $function', function),
            "revision": ("revision = $revision", revision),
            "step": ("step = $step", step),
            "outcome": ("outcome = $outcome", outcome),
            "text": (_holds("prints", "error"), text),
        }
        search = Search("reward_logs", LOG_COLUMNS, ("phase", "idx", "function"), filters, order, after, limit)
        rows, following = self._page(uuid, search)
        return wire.Page(data=[_json(wire.RewardLogRow(**found)) for found in rows], next=following)

    def _page(self, uuid: str, search: Search) -> tuple[list[dict[str, Any]], str | None]:
        with self._database.read() as connection:
            files = segment_search.manifest(connection, jobrows.find(connection, uuid).id, search)
        return segment_search.page(files, self._artifacts, search)


def _holds(*columns: str) -> str:
    """The condition that one of the columns has $text in it, in any case."""
    return "(" + " OR ".join(f"contains(lower({column}), lower($text))" for column in columns) + ")"


def _completion(row: dict[str, Any]) -> dict[str, Any]:
    scores = row.pop("scores")
    values = {name: score["value"] for name, score in scores.items()}
    outcomes = {name: score["outcome"] for name, score in scores.items()}
    return _json(wire.CompletionRow(**row, scores=values, outcomes=outcomes))


def _json(row: wire.CompletionRow | wire.RewardLogRow) -> dict[str, Any]:
    return row.model_dump(mode="json", by_alias=True)
