"""SQL: rows against rows, order only where it is asked for, a database that no query can harm, and cheap tricks."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rewardsmith.rewards.library import sql_match

SCHEMA = """
CREATE TABLE city (name TEXT, land TEXT, people INT, size REAL);
INSERT INTO city VALUES ('Bonn', 'DE', 330, 141.06), ('Lyon', 'FR', 520, 47.87), ('Köln', 'DE', 1080, 405.0),
    ('Nice', 'FR', 340, NULL);
"""
NAMES = "SELECT name FROM city"
RANKED = "SELECT name FROM city ORDER BY people DESC"


def scored(completion: str, sql: str = NAMES, schema: str = SCHEMA, **settings: Any) -> float:
    return sql_match("", completion, {"sql": sql, "schema": schema}, **settings)


@pytest.mark.parametrize(
    ("completion", "sql", "expected"),
    [
        (NAMES, NAMES, 1.0),
        ("select name as n from city;", NAMES, 1.0),
        ("Like this:\n```sql\nSELECT name FROM city\n```\nDone.", NAMES, 1.0),
        ("```\nSELECT 1\n```\nor rather\n```sql\nSELECT name FROM city\n```", NAMES, 1.0),
        ("SELECT name FROM city ORDER BY name", NAMES, 1.0),
        ("SELECT name FROM city -- all\n", NAMES, 1.0),
        ("SELECT name FROM city UNION ALL SELECT 'Bonn'", NAMES, 0.0),
        ("SELECT DISTINCT land FROM city", "SELECT land FROM city", 0.0),
        ("SELECT name, land FROM city", NAMES, 0.0),
        ("SELECT land, name FROM city", "SELECT name, land FROM city", 0.0),
        (RANKED, RANKED, 1.0),
        (NAMES, RANKED, 0.0),
        ("SELECT name FROM city ORDER BY people", RANKED, 0.0),
        ("SELECT SUM(size)/3 FROM city", "SELECT AVG(size) FROM city", 1.0),
        ("SELECT 4.0", "SELECT COUNT(*) FROM city", 1.0),
        ("SELECT '4'", "SELECT COUNT(*) FROM city", 0.0),
        ("SELECT NULL", "SELECT size FROM city WHERE name = 'Nice'", 1.0),
        ("SELECT 0", "SELECT size FROM city WHERE name = 'Nice'", 0.0),
        (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 3) SELECT i FROM n",
            "VALUES (1), (2), (3)",
            1.0,
        ),
    ],
)
def test_rows(completion: str, sql: str, expected: float) -> None:
    assert scored(completion, sql) == expected


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT name FROM city WHERE name IN (SELECT name FROM city ORDER BY size)",
        "SELECT name FROM city WHERE 'order by' <> \"name\"",
        "SELECT name FROM city /* ORDER BY size */ -- order by size",
        "SELECT name FROM (SELECT name FROM (SELECT name FROM city ORDER BY size))",
    ],
)
def test_an_inner_or_quoted_order_does_not_count(sql: str) -> None:
    assert scored(RANKED, sql) == 1.0
    assert scored(f"{NAMES} ORDER BY name", sql) == 1.0


def test_an_outer_order_counts_however_it_is_written() -> None:
    for sql in (
        "SELECT name FROM city order\n  by people desc",
        "SELECT name FROM (SELECT * FROM city) ORDER BY people DESC",
    ):
        assert scored(RANKED, sql) == 1.0
        assert scored(f"{NAMES} ORDER BY name", sql) == 0.0


ATTACKS = [
    "",
    "I do not know",
    "SELECT name FROM towns",
    "DROP TABLE city",
    "DELETE FROM city RETURNING name",
    "INSERT INTO city VALUES ('x', 'y', 1, 1)",
    "UPDATE city SET name = 'x'",
    "SELECT name FROM city; DROP TABLE city",
    "ATTACH DATABASE '/tmp/x.db' AS x",
    "PRAGMA writable_schema = 1",
    "SELECT * FROM pragma_table_info('city')",
    "CREATE TEMP TABLE t AS SELECT 1",
    "VACUUM INTO '/tmp/x.db'",
    "SELECT load_extension('x')",
    "SELECT zeroblob(1000000000)",
    "BEGIN EXCLUSIVE",
    "SELECT '\0'",
    "SELECT '\ud800'",
    "SELECT " + "(" * 5000 + "1" + ")" * 5000,
]


@pytest.mark.parametrize("completion", ATTACKS)
def test_what_does_not_run_or_does_not_only_read(completion: str) -> None:
    assert scored(completion, fails=-1.0) == -1.0
    assert scored(NAMES, fails=-1.0) == 1.0


def test_no_rows_are_not_enough_without_a_query() -> None:
    empty = "SELECT name FROM city WHERE people > 9999"
    assert scored("", empty) == 0.0
    assert scored("-- nothing", empty) == 0.0
    assert scored("SELECT name, land FROM city WHERE 0", empty) == 0.0
    assert scored("SELECT 1 WHERE 0", empty) == 1.0  # the trick that the docstring owns up to


def test_a_query_without_end_is_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
    assert scored(endless, seconds=0.05, fails=-1.0) == -1.0
    assert capsys.readouterr().out == "the query took over 0.05 s\n"
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 500) SELECT i FROM n"
    assert scored(many, most_rows=499, fails=-1.0) == -1.0
    assert scored(many, many, most_rows=500) == 1.0


def test_shares_for_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert scored("SELECT land FROM city", differs=0.25, fails=-0.25) == 0.25
    assert scored("SELECT lands FROM city", differs=0.25, fails=-0.25) == -0.25
    said = capsys.readouterr().out.splitlines()
    assert said == ["4 rows of 1 columns, expected 4 of 1", "the query does not run: no such column: lands"]


def test_a_reference_that_does_not_run_is_an_error_and_no_zero() -> None:
    for completion in (NAMES, "nonsense"):
        with pytest.raises(
            ValueError, match="the reference query does not run: no such table: towns: SELECT name FROM towns"
        ):
            scored(completion, "SELECT name FROM towns")


# ---- a database in a file -------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "odd ?#%name.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA)
    return path


def test_a_file_is_read_and_never_changed(database: Path) -> None:
    before = database.read_bytes()
    row = {"sql": NAMES, "db": str(database)}
    assert sql_match("", NAMES, row) == 1.0
    for completion in ATTACKS:
        assert sql_match("", completion, row) == 0.0
    assert database.read_bytes() == before
    assert [path.name for path in database.parent.iterdir() if path.is_file()] == [database.name]


def test_a_file_by_folder_and_name(database: Path) -> None:
    row = {"sql": NAMES, "db": database.name}
    assert sql_match("", NAMES, row, folder=str(database.parent)) == 1.0
    with pytest.raises(FileNotFoundError, match=r"there is no database .*; give its SQL in the column 'schema'"):
        sql_match("", NAMES, row, folder=str(database.parent / "other"))
    assert not (database.parent / "other").exists()
