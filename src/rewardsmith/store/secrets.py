"""Secrets: those that users keep here by key, and those that a job's reward functions are given. They are sealed.

A job has a value that came with it, or refers to a stored one and then gets what is stored when an attempt begins.
Who continues a version of their own inherits its secrets; values never come back out but to their owner and the job.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from rewardsmith import wire
from rewardsmith.config import STORED, hidden_secret
from rewardsmith.errors import ConfigError, Conflict, NotFound
from rewardsmith.store.database import Database
from rewardsmith.store.schema import job_secrets, jobs, now, secrets
from rewardsmith.store.seal import Seal


class Secrets:
    """A user's stored secrets. Nobody has those of another user."""

    def __init__(self, database: Database, seal: Seal) -> None:
        self._database = database
        self._seal = seal

    def list(self, user_id: int) -> builtins.list[wire.Secret]:
        """By key, without the values."""
        query = select(secrets).where(secrets.c.user_id == user_id).order_by(secrets.c.key)
        with self._database.read() as connection:
            return [_as_wire(row) for row in connection.execute(query)]

    def get(self, user_id: int, key: str) -> str:
        """The value. Raises NotFound."""
        with self._database.read() as connection:
            return self._seal.open(_find(connection, user_id, key).sealed, _place(user_id, key))

    def create(self, user_id: int, key: str, value: str) -> wire.Secret:
        """Raises Conflict when there is one of that key."""
        sealed = self._seal.seal(value, _place(user_id, key))
        with self._database.write() as connection:
            if _look_up(connection, user_id, key) is not None:
                raise Conflict(f"there is a secret {key!r} already; secrets.update gives it another value")
            row = {"user_id": user_id, "key": key, "sealed": sealed, "created_at": now(), "updated_at": now()}
            connection.execute(insert(secrets).values(row))
            return _as_wire(_find(connection, user_id, key))

    def update(self, user_id: int, key: str, value: str) -> wire.Secret:
        """Jobs that refer to it get the new value with their next attempt. Raises NotFound."""
        sealed = self._seal.seal(value, _place(user_id, key))
        with self._database.write() as connection:
            found = _find(connection, user_id, key)
            changed = update(secrets).where(secrets.c.id == found.id).values(sealed=sealed, updated_at=now())
            connection.execute(changed)
            return _as_wire(_find(connection, user_id, key))

    def delete(self, user_id: int, key: str) -> None:
        """Raises NotFound, and Conflict while a job that has not ended refers to it."""
        with self._database.write() as connection:
            found = _find(connection, user_id, key)
            using = select(jobs.c.uuid).join(job_secrets, job_secrets.c.version_id == jobs.c.version_id)
            live = job_secrets.c.secret_id == found.id, jobs.c.status.not_in(wire.TERMINAL)
            used = connection.scalars(using.where(*live)).all()
            if used:
                raise Conflict(f"job {', '.join(used)} uses the secret {key!r}; cancel it or wait for its end")
            connection.execute(delete(secrets).where(secrets.c.id == found.id))

    def of_job(self, uuid: str) -> dict[str, str]:
        """What the reward functions of a job are given, in the clear."""
        with self._database.read() as connection:
            return of_job(connection, self._seal, uuid)


def attach(connection: Connection, seal: Seal, job: Row[Any], given: Mapping[str, str]) -> None:
    """Give a new job its secrets, in the transaction that makes it. Values as in `GRPOConfig.secrets`.

    Raises ConfigError for a stored secret that is not there, and for a hidden value that is not inherited.
    """
    for name, value in given.items():
        row: dict[str, Any] = {"version_id": job.version_id, "name": name, "secret_id": None, "sealed": None}
        if value.startswith(STORED):
            row["secret_id"] = _stored(connection, job.user_id, name, value.removeprefix(STORED))
        elif value == hidden_secret(name):
            row |= _inherited(connection, job, name)
        else:
            row["sealed"] = seal.seal(value, _place_of_variable(job.user_id, name))
        connection.execute(insert(job_secrets).values(row))


def of_job(connection: Connection, seal: Seal, uuid: str) -> dict[str, str]:
    """Raises ConfigError for a stored secret that was deleted since, and for one that cannot be opened."""
    query = (
        select(jobs.c.user_id, job_secrets, secrets.c.key, secrets.c.sealed.label("stored"))
        .join(job_secrets, job_secrets.c.version_id == jobs.c.version_id)
        .outerjoin(secrets, secrets.c.id == job_secrets.c.secret_id)
        .where(jobs.c.uuid == uuid)
        .order_by(job_secrets.c.name)
    )
    found = {}
    for row in connection.execute(query):
        if row.stored is not None:
            found[row.name] = seal.open(row.stored, _place(row.user_id, row.key))
        elif row.sealed is not None:
            found[row.name] = seal.open(row.sealed, _place_of_variable(row.user_id, row.name))
        else:
            raise ConfigError(f"the stored secret that secrets.{row.name} refers to was deleted")
    return found


def _stored(connection: Connection, user_id: int, name: str, key: str) -> int:
    row = _look_up(connection, user_id, key)
    if row is None:
        raise ConfigError(f"secrets.{name}: there is no stored secret {key!r}; make it with secrets.create")
    return int(row.id)


def _inherited(connection: Connection, job: Row[Any], name: str) -> dict[str, Any]:
    """The row of the version that the job continues: of the same user, and not emptied meanwhile."""
    query = (
        select(job_secrets.c.secret_id, job_secrets.c.sealed)
        .join(jobs, jobs.c.version_id == job_secrets.c.version_id)
        .where(
            job_secrets.c.version_id == job.continues_id,
            job_secrets.c.name == name,
            jobs.c.user_id == job.user_id,
        )
    )
    row = connection.execute(query).one_or_none()
    if row is None or (row.secret_id is None and row.sealed is None):
        raise ConfigError(
            f"secrets.{name}: {hidden_secret(name)!r} stands for a value that is kept and not shown, and there is none "
            "to inherit; give the value, or name a stored secret"
        )
    return dict(row._mapping)


def _look_up(connection: Connection, user_id: int, key: str) -> Row[Any] | None:
    return connection.execute(select(secrets).where(secrets.c.user_id == user_id, secrets.c.key == key)).one_or_none()


def _find(connection: Connection, user_id: int, key: str) -> Row[Any]:
    row = _look_up(connection, user_id, key)
    if row is None:
        raise NotFound(f"there is no secret {key!r}")
    return row


def _place(user_id: int, key: str) -> str:
    return f"secret {user_id} {key}"


def _place_of_variable(user_id: int, name: str) -> str:
    return f"variable {user_id} {name}"


def _as_wire(row: Row[Any]) -> wire.Secret:
    return wire.Secret(key=row.key, created_at=row.created_at, updated_at=row.updated_at)
