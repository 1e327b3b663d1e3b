"""The tables. Names of constraints follow one convention, so that migrations can drop what they once made.

Times are UTC and timezone-aware on both sides. A job's own numbers are in `jobs`; what grows with its steps is in
`steps`, `metrics`, `segments` and `checkpoints`, all keyed by (job or version, step) first, the way they are read and
truncated. Files are named by path relative to the artifacts root.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime. SQLite keeps no zone, so the value is stored as UTC and read back as UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    """The clock of the store."""
    return datetime.now(UTC)


def _owned_by(table: str, **options: Any) -> Column[Any]:
    """A reference to a row without which this one has no meaning."""
    name = f"{table.removesuffix('s')}_id"
    return Column(name, ForeignKey(f"{table}.id", ondelete="CASCADE"), nullable=False, **options)


def _id() -> Column[Any]:
    return Column("id", Integer, primary_key=True)


def _uuid() -> Column[Any]:
    return Column("uuid", String(36), nullable=False, unique=True)


def _created_at() -> Column[Any]:
    return Column("created_at", UTCDateTime, nullable=False)


users = Table(
    "users",
    metadata,
    _id(),
    _uuid(),
    Column("username", String(100), nullable=False, unique=True),
    _created_at(),
)

repos = Table(
    "repos",
    metadata,
    _id(),
    _uuid(),
    Column("name", String(100), nullable=False, unique=True),
    Column("description", Text),
    Column("last_tag", Integer, nullable=False),  # counts on when versions are deleted: a tag is used once
    _owned_by("users"),
    _created_at(),
)

versions = Table(
    "versions",
    metadata,
    _id(),
    _owned_by("repos"),
    Column("tag", Integer, nullable=False),
    Column("base_model", String(500)),
    Column("description", Text),
    Column("archived", Boolean, nullable=False),
    Column("served_checkpoint", Integer),
    _owned_by("users"),
    _created_at(),
    UniqueConstraint("repo_id", "tag"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _owned_by("versions", primary_key=True),
    Column("checkpoint", Integer, primary_key=True, autoincrement=False),
    Column("step", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("state_path", Text),  # training state; only the newest is sure to be there
    Column("fingerprint", String(200), nullable=False),
    Column("eval_reward", Float),
    Column("best", Boolean, nullable=False),  # was the best when it was saved; see jobrows.best_checkpoint
    _created_at(),
)

uploads = Table(
    "uploads",
    metadata,
    _id(),
    Column("token_sha256", String(64), nullable=False, unique=True),
    Column("file_name", Text, nullable=False),
    _owned_by("users"),
    Column("received", Boolean, nullable=False),  # whole, to the last byte
    Column("expires_at", UTCDateTime, nullable=False),
)

datasets = Table(
    "datasets",
    metadata,
    _id(),
    _uuid(),
    Column("name", String(200), nullable=False, unique=True),
    Column("sha256", String(64), nullable=False, index=True),
    Column("rows", Integer, nullable=False),
    Column("columns", JSON, nullable=False),
    Column("prompt_lengths", JSON, nullable=False),
    _owned_by("users"),
    _created_at(),
)

jobs = Table(
    "jobs",
    metadata,
    _id(),
    _uuid(),
    _owned_by("users"),
    # What it is made of. The names stay when the version or the dataset is deleted.
    Column("version_id", ForeignKey("versions.id", ondelete="SET NULL"), unique=True),
    Column("repo_name", String(100), nullable=False, index=True),
    Column("tag", Integer, nullable=False),
    Column("dataset_id", ForeignKey("datasets.id", ondelete="SET NULL"), index=True),
    Column("dataset_name", String(200), nullable=False),
    Column("dataset_path", Text, nullable=False),
    Column("base_model", String(500), nullable=False),
    Column("base_model_source", Text, nullable=False),
    Column("continues_id", ForeignKey("versions.id", ondelete="SET NULL"), index=True),
    Column("continue_from_path", Text),
    Column("description", Text),
    Column("idempotency_key", String(200)),
    Column("body_sha256", String(64)),
    # Where it stands.
    Column("status", String(20), nullable=False),
    Column("action", String(20), nullable=False),  # what Control tells the process
    Column("paused_reason", Text),
    Column("error", Text),
    Column("step", Integer, nullable=False),
    Column("furthest_step", Integer, nullable=False),  # over all attempts; progress is what goes beyond it
    Column("total_steps", Integer),
    Column("steps_per_epoch", Integer),
    Column("total_reward", Float),
    # Who runs it.
    Column("attempt", Integer, nullable=False),
    Column("failures", Integer, nullable=False),  # failed attempts in a row without progress
    Column("fence", Integer, nullable=False),
    Column("host", String(200)),
    Column("handle", String(200)),
    Column("lease_until", UTCDateTime),
    Column("backoff_until", UTCDateTime),
    _created_at(),
    Column("updated_at", UTCDateTime, nullable=False),
    UniqueConstraint("user_id", "idempotency_key"),
    Index(None, "status", "id"),
)

tokens = Table(
    "tokens",
    metadata,
    _id(),
    Column("sha256", String(64), nullable=False, unique=True),
    _owned_by("users"),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), index=True),  # None for a user's own token
    Column("fence", Integer),
    _created_at(),
)

revisions = Table(
    "revisions",
    metadata,
    _owned_by("jobs", primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("effective_step", Integer),
    Column("refused", Text),
    Column("params", JSON, nullable=False),  # the job's whole config with this revision
    Column("functions", JSON, nullable=False),
    Column("created_by", String(100), nullable=False),
    Column("note", Text),
    Column("compared_steps", Integer, nullable=False, server_default="0"),  # for which old functions are scored on
    _created_at(),
)

job_events = Table(
    "job_events",
    metadata,
    _id(),
    _owned_by("jobs"),
    Column("at", UTCDateTime, nullable=False),
    Column("kind", String(20), nullable=False),
    Column("status", String(20)),  # the status that was entered with it
    Column("message", Text, nullable=False),
    Column("step", Integer),
    Column("fence", Integer, nullable=False),
    Index(None, "job_id", "id"),
)

steps = Table(
    "steps",
    metadata,
    _owned_by("jobs", primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("fence", Integer, nullable=False),
    Column("epoch", Float, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("at", UTCDateTime, nullable=False),
)

metrics = Table(
    "metrics",
    metadata,
    _owned_by("jobs", primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("series", String(300), primary_key=True),
    Column("value", Float, nullable=False),
    sqlite_with_rowid=False,  # the key is most of the row: without this it is stored twice
)

segments = Table(
    "segments",
    metadata,
    _owned_by("jobs", primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("family", String(20), primary_key=True),
    Column("phase", String(10), primary_key=True),
    Column("rows", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("path", Text, nullable=False, unique=True),
    Column("sha256", String(64), nullable=False),
)

secrets = Table(
    "secrets",
    metadata,
    _id(),
    _owned_by("users"),
    Column("key", String(200), nullable=False),
    Column("sealed", LargeBinary, nullable=False),  # see store.secrets
    _created_at(),
    Column("updated_at", UTCDateTime, nullable=False),
    UniqueConstraint("user_id", "key"),
)

# What a job's reward functions see. With the version, so that it goes when nothing can continue the job any more.
job_secrets = Table(
    "job_secrets",
    metadata,
    _owned_by("versions", primary_key=True),
    Column("name", String(100), primary_key=True),
    Column("secret_id", ForeignKey("secrets.id", ondelete="SET NULL"), index=True),  # one of the user's stored ones
    Column("sealed", LargeBinary),  # or a value that came with the job
)
