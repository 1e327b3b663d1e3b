import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Table, insert, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from rewardsmith.errors import ConfigError
from rewardsmith.store.database import Database, migration_config
from rewardsmith.store.schema import metadata, users


@pytest.fixture
def database(tmp_path: Path) -> Database:
    opened = Database(f"sqlite:///{tmp_path / 'new' / 'folder' / 'db.sqlite'}")
    opened.migrate()
    return opened


def _user(name: str) -> dict[str, object]:
    return {"uuid": name, "username": name, "created_at": datetime.now(UTC)}


def test_migrations_make_exactly_the_schema(database: Database) -> None:
    with database.write() as connection:
        command.check(migration_config(connection))  # raises when autogenerate finds an operation


@pytest.mark.parametrize("table", metadata.sorted_tables, ids=str)
def test_postgres_can_have_every_table(table: Table) -> None:
    assert "sqlite" not in str(CreateTable(table).compile(dialect=postgresql.dialect())).lower()


def test_migrations_can_be_taken_back(database: Database) -> None:
    with database.write() as connection:
        command.downgrade(migration_config(connection), "base")
        left = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars().all()
    assert left == ["alembic_version"]
    database.migrate()
    database.close()


def test_connections_have_the_settings_the_store_relies_on(database: Database) -> None:
    with database.read() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 30_000, "foreign_keys": 1}


def test_a_write_transaction_is_alone_from_its_start(database: Database) -> None:
    """Two that read and then write would otherwise both read first, and one would fail or overwrite the other."""
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait()
        with database.write() as connection:
            order.append(f"second sees {len(connection.execute(select(users)).all())}")

    thread = threading.Thread(target=second)
    thread.start()
    with database.write() as connection:
        inside.set()
        thread.join(timeout=0.2)
        connection.execute(insert(users).values(_user("first")))
        order.append("first wrote")
    thread.join(timeout=30)
    assert order == ["first wrote", "second sees 1"]


def test_readers_wait_for_nobody_and_see_one_snapshot(database: Database) -> None:
    with database.read() as reader:
        assert reader.execute(select(users)).all() == []
        with database.write() as writer:
            writer.execute(insert(users).values(_user("new")))
            assert reader.execute(select(users)).all() == []
        assert reader.execute(select(users)).all() == []
    with database.read() as reader:
        assert len(reader.execute(select(users)).all()) == 1


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    with pytest.raises(RuntimeError), database.write() as connection:
        connection.execute(insert(users).values(_user("half")))
        raise RuntimeError
    with database.read() as connection:
        assert connection.execute(select(users)).all() == []


def test_times_come_back_as_aware_utc(database: Database) -> None:
    given = datetime(2026, 3, 1, 12, 30, 0, 123456, tzinfo=timezone(timedelta(hours=5)))
    with database.write() as connection:
        connection.execute(insert(users).values(_user("x") | {"created_at": given}))
    with database.read() as connection:
        stored = connection.execute(select(users.c.created_at)).scalar_one()
    assert stored == given and stored.tzinfo is UTC


@pytest.mark.slow
def test_processes_may_open_a_new_database_at_the_same_time(tmp_path: Path) -> None:
    script = "import sys; from rewardsmith.store.database import Database; Database(sys.argv[1]).migrate()"
    command_line = [sys.executable, "-c", script, f"sqlite:///{tmp_path / 'db.sqlite'}"]
    openers = [subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [opener.communicate(timeout=60)[1] for opener in openers]
    assert [opener.returncode for opener in openers] == [0, 0, 0, 0], errors


def test_a_database_of_a_newer_version_is_refused_in_words(database: Database) -> None:
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigError, match=r"newer Rewardsmith .*9999.*REWARDSMITH_HOME"):
        database.migrate()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "no url"])
def test_urls_that_name_no_database_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///path/to/file"):
        Database(url)
