"""Datasets: upload in two steps (contract 5.1), check, keep as canonical JSON lines under `datasets/<sha256>.jsonl`.

An upload is begun; receiving, while its bytes come into a `.part` file; received, once the last one is there and the
file has its name. Only then it can be finished. Two datasets with the same rows share one file. A refused upload
leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import Connection, Row, delete, insert, or_, select, update

from rewardsmith import wire
from rewardsmith.errors import Conflict, DatasetError, Forbidden, NotFound
from rewardsmith.store.artifacts import Artifacts
from rewardsmith.store.database import Database
from rewardsmith.store.dataset_file import Summary, check_file, format_of
from rewardsmith.store.schema import datasets, jobs, now, uploads

UPLOAD_LIFETIME = timedelta(hours=1)
LONGEST_NAME = 200


class Datasets:
    """Files go through a private scratch folder, named by a digest of their upload token, never by what a user sent."""

    def __init__(self, database: Database, artifacts: Artifacts, max_bytes: int) -> None:
        self._database = database
        self._artifacts = artifacts
        self._max_bytes = max_bytes

    def begin_upload(self, file_name: str, user_id: int) -> str:
        """A token, good for one hour and one upload; `file_name` gives the format. DatasetError for another format."""
        format_of(file_name)
        self._sweep()
        token = secrets.token_urlsafe(32)
        row = {"file_name": file_name, "user_id": user_id, "received": False, "expires_at": now() + UPLOAD_LIFETIME}
        with self._database.write() as connection:
            connection.execute(delete(uploads).where(uploads.c.expires_at < now()))
            connection.execute(insert(uploads).values(token_sha256=_digest(token), **row))
        return token

    def check_upload(self, token: str) -> None:
        """Raises NotFound, or Conflict for a used token."""
        with self._database.read() as connection:
            upload = _find_upload(connection, token)
        if upload.received or self._part(token).exists():
            raise _used()

    def receive_upload(self, token: str) -> BinaryIO:
        """The new local file to write the body to, once per token. Raises NotFound, or Conflict for a used token.

        The caller ends it with `complete_upload`, or with `abandon_upload` when the body breaks off.
        """
        self.check_upload(token)
        try:
            return self._part(token).open("xb")
        except FileExistsError:
            raise _used() from None

    def complete_upload(self, token: str, file: BinaryIO) -> None:
        """The last byte is there: close the file, which can become a dataset now. Raises NotFound."""
        file.close()
        with self._database.write() as connection:
            upload = _find_upload(connection, token)
            self._part(token).rename(self._file(upload.token_sha256))
            connection.execute(update(uploads).where(uploads.c.id == upload.id).values(received=True))

    def abandon_upload(self, token: str, file: BinaryIO) -> None:
        """Forget an upload and its file."""
        file.close()
        with self._database.write() as connection:
            connection.execute(delete(uploads).where(uploads.c.token_sha256 == _digest(token)))
        self._part(token).unlink(missing_ok=True)
        self._file(_digest(token)).unlink(missing_ok=True)

    def finish_upload(self, name: str, token: str, user_id: int) -> wire.Dataset:
        """Check the file and register it as `name`. The token of a received upload is spent either way.

        Raises DatasetError with row numbers and reasons (nothing is kept then), Conflict for a taken name and for a
        file that has not come whole, NotFound for an unknown token, Forbidden for somebody else's.
        """
        with self._database.write() as connection:
            upload = _find_upload(connection, token)
            if upload.user_id != user_id:
                raise Forbidden("this upload was begun by somebody else")
            if not upload.received:
                raise Conflict(
                    f"the file for {name!r} has not been received whole: send it to the presigned URL and wait for the "
                    "answer. If the sending broke off, begin a new upload"
                )
            connection.execute(delete(uploads).where(uploads.c.id == upload.id))
        received, canonical = self._file(upload.token_sha256), self._file(upload.token_sha256 + ".jsonl")
        try:
            _check_name(name)
            with self._database.read() as connection:
                _refuse_taken(connection, name)
            summary = check_file(received, upload.file_name, canonical, self._max_bytes)
            return self._register(name, canonical, summary, user_id)
        finally:
            received.unlink(missing_ok=True)
            canonical.unlink(missing_ok=True)

    def get(self, ref: str) -> wire.Dataset:
        """By name, `connection/name` or uuid. Raises NotFound."""
        with self._database.read() as connection:
            return _as_wire(find_dataset(connection, ref))

    def list(self) -> list[wire.Dataset]:
        """Newest first."""
        with self._database.read() as connection:
            return [_as_wire(row) for row in connection.execute(select(datasets).order_by(datasets.c.id.desc()))]

    def delete(self, ref: str) -> None:
        """Raises Conflict while a job that has not ended uses it."""
        with self._database.write() as connection:
            row = find_dataset(connection, ref)
            in_use = select(jobs.c.uuid).where(jobs.c.dataset_id == row.id, jobs.c.status.not_in(wire.TERMINAL))
            used = connection.scalars(in_use).all()
            if used:
                raise Conflict(
                    f"dataset {row.name!r} is in use by job {', '.join(used)}; cancel it or wait for its end"
                )
            connection.execute(delete(datasets).where(datasets.c.id == row.id))
            if not connection.scalar(select(datasets.c.id).where(datasets.c.sha256 == row.sha256).limit(1)):
                # Inside the transaction: a registration of the same rows comes before or after, and puts it back.
                self._artifacts.delete(dataset_path(row.sha256))

    def rows(self, ref: str) -> Iterator[dict[str, Any]]:
        """The rows in file order, JSON types as uploaded."""
        with self._artifacts.fetch(self.path(ref)).open("rb") as lines:
            for line in lines:
                yield json.loads(line)

    def path(self, ref: str) -> str:
        """Where the canonical JSON lines lie in the artifacts (for downloads). Raises NotFound."""
        with self._database.read() as connection:
            return dataset_path(find_dataset(connection, ref).sha256)

    def _file(self, name: str) -> Path:
        return self._artifacts.scratch() / f"upload-{name}"

    def _part(self, token: str) -> Path:
        """What has come of a body so far. One that a killed server leaves is never read, and swept later."""
        return self._file(_digest(token) + ".part")

    def _sweep(self) -> None:
        """Remove what uploads left behind that were begun and never finished, or whose process was killed."""
        oldest = time.time() - UPLOAD_LIFETIME.total_seconds()
        for file in self._artifacts.scratch().iterdir():
            with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                if file.stat().st_mtime < oldest:
                    file.unlink()

    def _register(self, name: str, canonical: Path, summary: Summary, user_id: int) -> wire.Dataset:
        path = dataset_path(summary.sha256)
        self._put(path, canonical)
        row = {
            "uuid": str(uuid.uuid4()),
            "name": name,
            "sha256": summary.sha256,
            "rows": summary.rows,
            "columns": summary.columns,
            "prompt_lengths": [bucket.model_dump() for bucket in summary.prompt_lengths],
            "user_id": user_id,
            "created_at": now(),
        }
        with self._database.write() as connection:
            _refuse_taken(connection, name)
            connection.execute(insert(datasets).values(row))
            self._put(path, canonical)  # a deletion of the same rows may have come between
            return _as_wire(find_dataset(connection, name))

    def _put(self, path: str, file: Path) -> None:
        if not self._artifacts.exists(path):
            try:
                self._artifacts.put(path, file)
            except Conflict:
                return  # another upload of the same rows was faster


def dataset_path(sha256: str) -> str:
    return f"datasets/{sha256}.jsonl"


def find_dataset(connection: Connection, ref: str) -> Row[Any]:
    """By name, `connection/name` or uuid. Raises NotFound."""
    name = ref.removeprefix(f"{wire.DEFAULT_CONNECTION}/")
    rows = connection.execute(select(datasets).where(or_(datasets.c.name == name, datasets.c.uuid == name))).all()
    if not rows:
        raise NotFound(f"no dataset {ref!r}; upload it with datasets.from_file")
    return next((row for row in rows if row.name == name), rows[0])


def _find_upload(connection: Connection, token: str) -> Row[Any]:
    query = select(uploads).where(uploads.c.token_sha256 == _digest(token), uploads.c.expires_at > now())
    upload = connection.execute(query).one_or_none()
    if upload is None:
        raise NotFound("this upload is unknown, finished or older than an hour; begin a new upload")
    return upload


def _used() -> Conflict:
    return Conflict("this upload link was used; begin a new upload")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _check_name(name: str) -> None:
    """Raises DatasetError."""
    plain = name.isprintable() and name == name.strip() and not set(name) & set("/\\")
    if not plain or not 1 <= len(name) <= LONGEST_NAME or name in (".", ".."):
        raise DatasetError(
            f"dataset name {name!r}: use 1 to {LONGEST_NAME} printable characters without / and \\, "
            "and no space at either end"
        )


def _refuse_taken(connection: Connection, name: str) -> None:
    """Raises Conflict."""
    if connection.scalar(select(datasets.c.id).where(datasets.c.name == name)):
        raise Conflict(f"dataset {name!r} exists; take another name, or delete that one first")


def _as_wire(row: Row[Any]) -> wire.Dataset:
    return wire.Dataset(
        uuid=row.uuid,
        id=row.id,
        name=row.name,
        rows=row.rows,
        columns=row.columns,
        prompt_lengths=[wire.LengthBucket(**bucket) for bucket in row.prompt_lengths],
        created_at=row.created_at,
    )
