"""The reward log of a job: what its filters mean, and the log folded, so that a thousand equal errors are one line.

Every call has a row: outcome, value, time, and what it printed or how it failed. Two calls are folded together when
function, revision, outcome and the line that says it are the same but for numbers. Folding reads files from the newest
on and stops after some seconds; a cursor goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import duckdb
from sqlalchemy import Row

from rewardsmith import wire
from rewardsmith.store import segment_search
from rewardsmith.store.artifacts import Artifacts
from rewardsmith.store.segment_search import Order, Position, Search, batches, holds, opened, quoted, where

COLUMNS = tuple(wire.RewardLogRow.model_fields)
KEY = ("phase", "idx", "function")
# Calls that printed nothing and did not fail are stored for their times; who reads the log rarely wants them.
SAID = "$said AND (prints <> '' OR error <> '' OR outcome NOT IN ('ok', 'abstain'))"

MOST_FOLDS = 1000  # of one batch of files that are looked at; others are counted
ROWS_AT_ONCE = 10_000
# The line that names an error: the last one of a traceback, the first one of anything else, without its numbers.
GIST = """left(regexp_replace(
    CASE WHEN error = '' THEN split_part(ltrim(prints, chr(10)), chr(10), 1)
         WHEN outcome IN ('exception', 'out_of_memory')
         THEN list_extract(string_split(rtrim(error, chr(10)), chr(10)), -1)
         ELSE split_part(error, chr(10), 1) END,
    '0x[0-9a-fA-F]+|[0-9]+', '#', 'g'), 200)"""
WHOLE_ROW = "{" + ", ".join(f"'{name}': {quoted(name)}" for name in COLUMNS) + "}"


def search(filters: wire.LogFilters, order: Order, after: str | None, limit: int) -> Search:
    """Raises ConfigError for a cursor or limit that cannot be."""
    conditions = {
        "function": ('"function" = $function', filters.function),
        "revision": ("revision = $revision", filters.revision),
        "step": ("step = $step", filters.step),
        "from_step": ("step >= $from_step", filters.from_step),
        "to_step": ("step <= $to_step", filters.to_step),
        # A row has the passes that were done after its step.
        "epoch": ("ceil(epoch) = $epoch", filters.epoch),
        "phase": ("phase = $phase", filters.phase),
        "outcome": ("outcome = $outcome", filters.outcome),
        "text": (holds("prints", "error"), filters.text),
        "said": (SAID, None if filters.every else True),
    }
    return Search("reward_logs", COLUMNS, KEY, conditions, order, after, limit)


def fold(files: Sequence[Row[Any]], artifacts: Artifacts, search: Search) -> wire.FoldedLogs:
    """The `limit` most frequent folds of what fits; for a search from the newest on."""
    deadline = time.monotonic() + segment_search.SEARCH_SECONDS
    folds: dict[tuple[Any, ...], wire.FoldedLog] = {}
    calls, following = 0, None
    with opened(artifacts) as engine:
        for batch in batches(files, ROWS_AT_ONCE):
            found, counted = _folded(engine, [str(artifacts.fetch(file.path)) for file in batch], search)
            calls += counted
            for new in found:
                key = (new.function, new.revision, new.outcome, new.gist)
                folds[key] = _both(folds[key], new) if key in folds else new
            if batch[-1] is not files[-1] and time.monotonic() > deadline:
                following = Position(batch[-1].step, None).cursor()
                break
    most = sorted(folds.values(), key=lambda one: (-one.count, -one.last_step, one.function, one.gist))[: search.limit]
    return wire.FoldedLogs(data=most, others=calls - sum(one.count for one in most), next=following)


def _folded(
    engine: duckdb.DuckDBPyConnection, paths: Sequence[str], search: Search
) -> tuple[list[wire.FoldedLog], int]:
    """The folds of some files, and how many calls fit at all."""
    condition, values = where(search)
    found = engine.execute(
        f'SELECT "function", revision, outcome, {GIST} AS gist, count(*) AS calls, min(step), max(step), '
        f"arg_max({WHOLE_ROW}, step), sum(count(*)) OVER () FROM read_parquet($paths) WHERE {condition} "
        f'GROUP BY "function", revision, outcome, gist ORDER BY calls DESC LIMIT {MOST_FOLDS}',
        values | {"paths": paths},
    ).fetchall()
    folds = [
        wire.FoldedLog(
            function=function,
            revision=revision,
            outcome=outcome,
            gist=gist,
            count=count,
            first_step=first,
            last_step=last,
            example=wire.RewardLogRow(**example),
        )
        for function, revision, outcome, gist, count, first, last, example, _ in found
    ]
    return folds, int(found[0][-1]) if found else 0


def _both(newer: wire.FoldedLog, older: wire.FoldedLog) -> wire.FoldedLog:
    return newer.model_copy(
        update={
            "count": newer.count + older.count,
            "first_step": min(newer.first_step, older.first_step),
            "last_step": max(newer.last_step, older.last_step),
        }
    )
