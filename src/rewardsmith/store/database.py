"""Opening the database: connections, transactions, migrations. The only place with SQL that one product understands.

SQLite runs in WAL mode with the driver in autocommit, so that the BEGIN this module emits is the one that counts: a
write transaction takes the lock at its start (a transaction that upgrades later fails at once whatever the timeout),
a read transaction sees one snapshot and waits for nobody. Postgres takes the same code with its own BEGIN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError

from rewardsmith.errors import ConfigError

BUSY_MILLISECONDS = 30_000
PRAGMAS = (
    f"PRAGMA busy_timeout={BUSY_MILLISECONDS}",  # first: switching to WAL may have to wait for another process
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=NORMAL",
    "PRAGMA foreign_keys=ON",
)


class Database:
    """A pool of connections; a thread holds one for as long as its transaction lasts."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that names no database."""
        try:
            self._url = make_url(url)
        except ArgumentError:
            raise ConfigError(
                f"database URL {url!r}: write sqlite:///path/to/file or postgresql+psycopg://..."
            ) from None
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        if self._is_sqlite:
            if not self._url.database or self._url.database == ":memory:":
                raise ConfigError("the database is a file: several processes share it. Write sqlite:///path/to/file")
            Path(self._url.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._engine = create_engine(self._url, pool_size=8, max_overflow=56)
        self._readers = self._engine.execution_options(read_only=True)
        if self._is_sqlite:
            event.listen(self._engine, "connect", _configure)
            event.listen(self._engine, "begin", _begin)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._readers.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Alone from its start to its end, so keep it short."""
        with self._engine.begin() as connection:
            yield connection

    def migrate(self) -> None:
        """Bring the schema up to date, in one transaction. ConfigError for a database of a newer Rewardsmith."""
        try:
            with self.write() as connection:
                command.upgrade(migration_config(connection), "head")
        except CommandError as error:
            raise ConfigError(
                f"the database {self._url.render_as_string()} was written by another, newer Rewardsmith ({error}); "
                "install that one, or give this one a REWARDSMITH_HOME of its own"
            ) from None

    def close(self) -> None:
        """Let SQLite refresh what its planner knows of the tables, and drop the connections."""
        if self._is_sqlite:
            with self.write() as connection:
                connection.exec_driver_sql("PRAGMA optimize")
        self._engine.dispose()


def migration_config(connection: Connection) -> Config:
    """What Alembic needs to run this package's migrations on an open transaction."""
    config = Config()
    config.set_main_option("script_location", "rewardsmith.store:migrations")
    config.attributes["connection"] = connection
    return config


def _configure(driver_connection: Any, _record: object) -> None:
    driver_connection.isolation_level = None
    for pragma in PRAGMAS:
        driver_connection.execute(pragma)


def _begin(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
