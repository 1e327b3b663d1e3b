"""Pages of rows from the segments of a job, with DuckDB (design 8).

The manifest says which files there are; they are read a few at a time from the asked end on until a page is full, so
a page costs the same in a long run. A page continues by key, (step, phase, idx[, function]): segments that arrive in
between neither repeat nor lose a row. DuckDB sees the artifacts and nothing else, and every value is a parameter;
conditions and column names come from `completions.py` and `reward_logs.py` alone.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import duckdb
from sqlalchemy import Connection, Row, select

from rewardsmith.errors import ConfigError
from rewardsmith.store.artifacts import Artifacts
from rewardsmith.store.schema import segments

Order = Literal["newest", "oldest"]
LONGEST_PAGE = 500
SEARCH_SECONDS = 5.0  # then a page goes out as far as it got
FIRST_FILES, MOST_FILES = 16, 256  # read together, once the files that could fill the page did not
KEY_TYPES = {"phase": str, "idx": int, "function": str}
ENGINE: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "threads": 2,
    "memory_limit": "1GB",
    "temp_directory": "",
}


@dataclass(frozen=True)
class Position:
    """Where a page ended: behind the row with `key` in `step`, or with None behind the whole step."""

    step: int
    key: list[str | int] | None

    def cursor(self) -> str:
        return base64.urlsafe_b64encode(json.dumps([self.step, self.key]).encode()).decode()


@dataclass(frozen=True)
class Search:
    """What to read. `filters`: parameter name -> (condition, value), None as value switches one off.

    `key` orders the rows of one step. Raises ConfigError for a cursor or limit that cannot be.
    """

    family: Literal["completions", "reward_logs"]
    columns: Sequence[str]
    key: Sequence[str]
    filters: Mapping[str, tuple[str, Any]]
    order: Order
    after: str | None
    limit: int

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= LONGEST_PAGE:
            raise ConfigError(f"limit {self.limit}: a page has 1 to {LONGEST_PAGE} rows")

    def value(self, name: str) -> Any:
        """What a filter asks for, None when it is off or not one of this search."""
        return self.filters.get(name, ("", None))[1]

    def position(self) -> Position | None:
        """Where the last page ended."""
        if self.after is None:
            return None
        try:
            step, key = json.loads(base64.urlsafe_b64decode(self.after.encode()))
            kinds = None if key is None else [type(value) for value in key]
        except (binascii.Error, ValueError, TypeError):
            step, key, kinds = None, None, None
        if type(step) is not int or kinds not in (None, [KEY_TYPES[name] for name in self.key]):
            raise ConfigError(f"cursor {self.after!r}: pass back what `next` gave for the same kind of page")
        return Position(step, key)


def manifest(connection: Connection, job_id: int, search: Search) -> list[Row[Any]]:
    """The committed files that can hold rows of the page, in the order of the search."""
    newest, position = search.order == "newest", search.position()
    query = select(segments.c.step, segments.c.rows, segments.c.path).where(
        segments.c.job_id == job_id, segments.c.family == search.family
    )
    for column in (segments.c.step, segments.c.phase):
        if search.value(column.name) is not None:
            query = query.where(column == search.value(column.name))
    if search.value("from_step") is not None:
        query = query.where(segments.c.step >= search.value("from_step"))
    if search.value("to_step") is not None:
        query = query.where(segments.c.step <= search.value("to_step"))
    if position is not None:
        reached = position.step if position.key is not None else position.step + (-1 if newest else 1)
        query = query.where(segments.c.step <= reached if newest else segments.c.step >= reached)
    by_step = segments.c.step.desc() if newest else segments.c.step
    return [*connection.execute(query.order_by(by_step, segments.c.phase))]


def page(files: Sequence[Row[Any]], artifacts: Artifacts, search: Search) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of one page and the cursor behind it, None at the end."""
    deadline = time.monotonic() + SEARCH_SECONDS
    rows: list[dict[str, Any]] = []
    with opened(artifacts) as engine:
        for batch in batches(files, search.limit + 1):
            paths = [str(artifacts.fetch(file.path)) for file in batch]
            rows += _query(engine, paths, search, search.limit + 1 - len(rows))
            if len(rows) > search.limit:
                last = rows[search.limit - 1]
                return rows[: search.limit], Position(last["step"], [last[name] for name in search.key]).cursor()
            if batch[-1] is not files[-1] and time.monotonic() > deadline:
                return rows, Position(batch[-1].step, None).cursor()
    return rows, None


@contextmanager
def opened(artifacts: Artifacts) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB over the artifacts."""
    with duckdb.connect(":memory:", config=ENGINE) as engine:
        engine.execute("SET allowed_directories = $folders", {"folders": [str(artifacts.local_root)]})
        engine.execute("SET enable_external_access = false")
        yield engine


def batches(files: Sequence[Row[Any]], rows_wanted: int) -> Iterator[list[Row[Any]]]:
    """Files to read together, never half a step: first as many as could fill the page, then ever more."""
    batch: list[Row[Any]] = []
    most: int | None = None
    for _, step in groupby(files, key=lambda file: file.step):
        batch += step
        if (len(batch) >= most) if most else (sum(file.rows for file in batch) >= rows_wanted):
            yield batch
            batch, most = [], min(most * 2, MOST_FILES) if most else FIRST_FILES
    if batch:
        yield batch


def _query(engine: duckdb.DuckDBPyConnection, paths: Sequence[str], search: Search, limit: int) -> list[dict[str, Any]]:
    condition, values = where(search)
    direction = "DESC" if search.order == "newest" else "ASC"
    key = ", ".join(map(quoted, search.key))
    found = engine.execute(
        f"SELECT {', '.join(map(quoted, search.columns))} FROM read_parquet($paths) "
        f"WHERE {condition} ORDER BY step {direction}, {key} LIMIT $limit",
        values | {"paths": paths, "limit": limit},
    )
    return [dict(zip(search.columns, row, strict=True)) for row in found.fetchall()]


def where(search: Search) -> tuple[str, dict[str, Any]]:
    """The condition for rows that fit the filters and lie behind the last page, and its parameters."""
    filters = {name: pair for name, pair in search.filters.items() if pair[1] is not None}
    conditions = [condition for condition, _ in filters.values()]
    values: dict[str, Any] = {name: value for name, (_, value) in filters.items()}
    position = search.position()
    if position is not None and position.key is not None:
        beyond = "<" if search.order == "newest" else ">"
        key, last = ", ".join(map(quoted, search.key)), ", ".join(f"$last_{name}" for name in search.key)
        conditions.append(f"(step {beyond} $last_step OR (step = $last_step AND ({key}) > ({last})))")
        values["last_step"] = position.step
        values |= {f"last_{name}": value for name, value in zip(search.key, position.key, strict=True)}
    return " AND ".join(conditions) or "true", values


def quoted(name: str) -> str:
    return f'"{name}"'


def holds(*columns: str) -> str:
    """The condition that one of the columns has $text in it, in any case."""
    return "(" + " OR ".join(f"contains(lower({column}), lower($text))" for column in columns) + ")"
