"""Does the query of the answer find the same rows as the reference query? SQLite, read-only.

The function stands alone; settings are keyword-only parameters.
"""

from typing import Any


def sql_match(
    prompt: str,
    completion: str,
    example: dict[str, Any],
    *,
    column: str = "sql",
    schema: str = "schema",
    database: str = "db",
    folder: str = "",
    seconds: float = 1.0,
    most_rows: int = 10_000,
    differs: float = 0.0,
    fails: float = 0.0,
) -> float:
    """1 if the query in the completion gives the rows of the reference query; the first reason against it is printed.

    The query is the last ``` fence of the completion, or else all of it: one statement that only reads. Rows count with
    their number of times. Their order counts only if the reference has an ORDER BY outside all brackets. Numbers
    are compared to nine digits, the names of columns not at all.

    Range: 0 or 1; `differs` and `fails` can pay more or less than 0 (-1 for a query that does not run is common).
    Reads: `column`, the reference query; and `schema`, SQL text that makes and fills the database in memory, or, if the
    row has no such column, `database`, the path of a SQLite file (below `folder`, if that is set).
    Settings: `seconds` and `most_rows` for each of both queries; `differs` is paid for other rows, `fails` for a query
    that does not run, writes, or takes too long.
    Gamed by: a query that names the answer, SELECT 42, where answers can be known or guessed; and by any query without
    rows where the reference finds none. Ask for several rows, and leave out questions with an empty answer.
    """
    import os
    import re
    import sqlite3
    import time
    from collections import Counter
    from contextlib import closing
    from urllib.parse import quote

    def opened() -> sqlite3.Connection:
        if schema in example:
            connection = sqlite3.connect(":memory:")
            connection.executescript(example[schema])
        else:
            path = os.path.abspath(os.path.join(folder, example[database]))
            if not os.path.isfile(path):
                raise FileNotFoundError(f"there is no database {path} here; give its SQL in the column {schema!r}")
            # Nothing may change the file, so SQLite needs no locks and writes no files beside it.
            connection = sqlite3.connect(f"file:{quote(path)}?mode=ro&immutable=1", uri=True)
        reads = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in reads else sqlite3.SQLITE_DENY)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000_000)  # bytes of a text or row: no zeroblob(1e9)
        return connection

    def rows_of(query: str) -> tuple[int, list[tuple[object, ...]]]:
        """Number of columns, and rows. Raises ValueError with the reason."""
        until = time.monotonic() + seconds
        connection.set_progress_handler(lambda: time.monotonic() > until, 10_000)
        try:
            cursor = connection.execute(query)
            found = cursor.fetchmany(most_rows + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            late = time.monotonic() > until
            raise ValueError(f"took over {seconds} s" if late else f"does not run: {error}") from None
        if cursor.description is None or len(found) > most_rows:
            raise ValueError(f"gives more than {most_rows} rows" if found else "is not a query")
        return len(cursor.description), [tuple(map(comparable, row)) for row in found]

    def comparable(value: object) -> object:
        return float(f"{value:.9g}") if isinstance(value, float) else value

    def minds_order(query: str) -> bool:
        apart = r"""'(?:[^']|'')*'|"[^"]*"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/"""
        outer, count = re.sub(apart, " ", query, flags=re.DOTALL), 1
        while count:
            outer, count = re.subn(r"\([^()]*\)", " ", outer)
        return bool(re.search(r"\border\s+by\b", outer, re.IGNORECASE))

    fences = re.findall(r"```(?:\w*)\n(.*?)```", completion, re.DOTALL)
    with closing(opened()) as connection:
        try:
            wanted = rows_of(example[column])
        except ValueError as error:
            raise ValueError(f"the reference query {error}: {example[column]}") from None
        try:
            given = rows_of(fences[-1] if fences else completion)
        except ValueError as error:
            print(f"the query {error}")
            return fails
    same = given[1] == wanted[1] if minds_order(example[column]) else Counter(given[1]) == Counter(wanted[1])
    if same and given[0] == wanted[0]:
        return 1.0
    print(f"{len(given[1])} rows of {given[0]} columns, expected {len(wanted[1])} of {wanted[0]}")
    return differs
