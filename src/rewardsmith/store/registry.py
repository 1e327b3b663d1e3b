"""Users, tokens, repos and adapter versions (contract 1.2). Tokens are kept as SHA-256 only.

A version's rows go in one transaction, its files after it: a crash in between leaves files that nothing names.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Select, delete, insert, select, update

from rewardsmith import wire
from rewardsmith.errors import ConfigError, Conflict, NotFound, Unauthorized
from rewardsmith.store import adapters
from rewardsmith.store.artifacts import Artifacts
from rewardsmith.store.database import Database
from rewardsmith.store.schema import jobs, now, repos, tokens, users, versions

OWNER = "owner"
REPO_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Identity:
    """Who a token speaks for. A job's token has its job and fence; a stale fence is refused by what it then calls."""

    user_id: int
    username: str
    scope: Literal["user", "job"]
    job_uuid: str | None = None
    fence: int | None = None


class Registry:
    def __init__(self, database: Database, artifacts: Artifacts) -> None:
        self._database = database
        self._artifacts = artifacts

    def ensure_owner(self, token: str) -> Identity:
        """Make `token` the owner's one token, and the owner if there is none. An earlier owner token stops working."""
        with self._database.write() as connection:
            user_id = connection.scalar(select(users.c.id).where(users.c.username == OWNER))
            if user_id is None:
                owner = {"uuid": str(uuid.uuid4()), "username": OWNER, "created_at": now()}
                user_id = connection.execute(insert(users).values(owner).returning(users.c.id)).scalar_one()
            connection.execute(delete(tokens).where(tokens.c.user_id == user_id, tokens.c.job_id.is_(None)))
            add_token(connection, token, user_id)
            return Identity(user_id, OWNER, "user")

    def identify(self, token: str) -> Identity:
        """Raises Unauthorized for a token nobody has."""
        query = (
            select(users.c.id, users.c.username, tokens.c.fence, jobs.c.uuid.label("job_uuid"))
            .select_from(tokens.join(users).outerjoin(jobs, jobs.c.id == tokens.c.job_id))
            .where(tokens.c.sha256 == digest(token))
        )
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise Unauthorized("the API token is not known to this server")
        scope: Literal["user", "job"] = "user" if row.job_uuid is None else "job"
        return Identity(row.id, row.username, scope, row.job_uuid, row.fence)

    def user(self, user_id: int) -> wire.CurrentUser:
        """Raises NotFound."""
        with self._database.read() as connection:
            row = connection.execute(select(users).where(users.c.id == user_id)).one_or_none()
        if row is None:
            raise NotFound(f"no user {user_id}")
        return wire.CurrentUser(id=row.id, username=row.username, uuid=row.uuid)

    def create_repo(self, name: str, description: str | None, exists_ok: bool, user_id: int) -> wire.Repo:
        """Raises ConfigError for a bad name, Conflict for a taken one unless `exists_ok`."""
        if not REPO_NAME.fullmatch(name):
            raise ConfigError(
                f"repo name {name!r}: use 1 to 100 letters, digits, - _ and . and begin with none of - and ."
            )
        with self._database.write() as connection:
            taken = connection.scalar(select(repos.c.id).where(repos.c.name == name))
            if taken and not exists_ok:
                raise Conflict(f"repo {name!r} exists; pass exists_ok=True to use it, or take another name")
            if not taken:
                row = {"name": name, "description": description, "user_id": user_id, "last_tag": 0}
                connection.execute(insert(repos).values(uuid=str(uuid.uuid4()), created_at=now(), **row))
            return _repos(connection, select(repos).where(repos.c.name == name))[0]

    def get_repo(self, ref: str) -> wire.Repo:
        """By name or uuid. Raises NotFound."""
        with self._database.read() as connection:
            return _repos(connection, select(repos).where(repos.c.id == adapters.find_repo(connection, ref).id))[0]

    def list_repos(self, limit: int = 10) -> list[wire.Repo]:
        """Newest first."""
        with self._database.read() as connection:
            return _repos(connection, select(repos).order_by(repos.c.id.desc()).limit(limit))

    def delete_repo(self, ref: str) -> None:
        """Remove the repo, its versions and their files; its jobs stay as history. Forbidden while one of them runs."""
        with self._database.write() as connection:
            repo = adapters.find_repo(connection, ref)
            ids = connection.scalars(select(versions.c.id).where(versions.c.repo_id == repo.id)).all()
            adapters.refuse_in_use(connection, ids, f"repo {repo.name!r}")
            files = adapters.files(connection, ids)
            connection.execute(delete(repos).where(repos.c.id == repo.id))
        self._delete_files(files)

    def get_version(self, repo: str, tag: int, checkpoint: int | None = None) -> wire.AdapterVersion:
        """`adapter_path` is the served checkpoint's (or the asked one's), None while there is none. Raises NotFound."""
        with self._database.read() as connection:
            return adapters.load_version(connection, wire.AdapterId(repo, tag, checkpoint))

    def list_versions(self, repo: str | None = None) -> list[wire.AdapterVersion]:
        """Newest first, archived ones too. Raises NotFound."""
        with self._database.read() as connection:
            query = adapters.described().order_by(versions.c.id.desc())
            if repo is not None:
                query = query.where(versions.c.repo_id == adapters.find_repo(connection, repo).id)
            return [adapters.as_wire(connection, row, row.served_checkpoint) for row in connection.execute(query).all()]

    def set_archived(self, repo: str, tag: int, archived: bool) -> wire.AdapterVersion:
        """Raises NotFound."""
        with self._database.write() as connection:
            version = adapters.find_version(connection, wire.AdapterId(repo, tag))
            connection.execute(update(versions).where(versions.c.id == version.id).values(archived=archived))
            return adapters.load_version(connection, wire.AdapterId(repo, tag))

    def delete_version(self, repo: str, tag: int) -> None:
        """Remove a version and its files; its tag is not used again. Forbidden while a job fills or continues it."""
        with self._database.write() as connection:
            version = adapters.find_version(connection, wire.AdapterId(repo, tag))
            adapters.refuse_in_use(connection, [version.id], f"{version.repo}/{tag}")
            files = adapters.files(connection, [version.id])
            connection.execute(delete(versions).where(versions.c.id == version.id))
        self._delete_files(files)

    def adapter_path(self, repo: str, tag: int, checkpoint: int | None = None) -> str:
        """The folder of the adapter in the artifacts. Raises NotFound, and says why when the run gave none."""
        with self._database.read() as connection:
            return adapters.find_adapter(connection, wire.AdapterId(repo, tag, checkpoint))

    def _delete_files(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._artifacts.delete(path)


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def add_token(
    connection: Connection, token: str, user_id: int, job_id: int | None = None, fence: int | None = None
) -> None:
    row = {"user_id": user_id, "job_id": job_id, "fence": fence, "created_at": now()}
    connection.execute(insert(tokens).values(sha256=digest(token), **row))


def _repos(connection: Connection, query: Select[Any]) -> list[wire.Repo]:
    """The repos of a query on `repos`, each with its versions."""
    rows = connection.execute(query).all()
    tags: dict[int, list[wire.VersionSummary]] = defaultdict(list)
    found = select(versions, users.c.username).join(users, users.c.id == versions.c.user_id).order_by(versions.c.tag)
    for row in connection.execute(found.where(versions.c.repo_id.in_([row.id for row in rows]))):
        tags[row.repo_id].append(
            wire.VersionSummary(
                tag=row.tag,
                created_at=row.created_at,
                created_by=row.username,
                base_model=row.base_model,
                archived=row.archived,
            )
        )
    return [
        wire.Repo(uuid=row.uuid, name=row.name, description=row.description, all_versions=tags[row.id]) for row in rows
    ]
