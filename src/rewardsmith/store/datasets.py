"""Datasets: upload, check, keep as canonical JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewardsmith import wire
from rewardsmith.store.artifacts import Artifacts
from rewardsmith.store.database import Database


class Datasets:
    """Uploads in two steps (contract 5.1): a token, bytes written to its file, then `finish_upload`."""

    def __init__(self, database: Database, artifacts: Artifacts, max_bytes: int) -> None:
        self._database = database
        self._artifacts = artifacts
        self._max_bytes = max_bytes

    def begin_upload(self, file_name: str) -> str:
        """A token, good for one hour and one upload; `file_name` gives the format. DatasetError for another format."""
        raise NotImplementedError

    def upload_file(self, token: str) -> Path:
        """The new local file to write the body to, once per token. Raises NotFound, or Conflict for a used token.

        The caller counts bytes, raises TooLarge, and calls `abandon_upload` when the body breaks off.
        """
        raise NotImplementedError

    def abandon_upload(self, token: str) -> None:
        """Forget an upload and its file."""
        raise NotImplementedError

    def finish_upload(self, name: str, token: str) -> wire.Dataset:
        """Check the file and register it as `name`. The token is spent either way.

        Raises DatasetError with row numbers and reasons (nothing is kept then), Conflict for a taken name, NotFound
        for an unknown token.
        """
        raise NotImplementedError

    def get(self, ref: str) -> wire.Dataset:
        """By name, `connection/name` or uuid. Raises NotFound."""
        raise NotImplementedError

    def list(self) -> list[wire.Dataset]:
        """Newest first."""
        raise NotImplementedError

    def delete(self, ref: str) -> None:
        """Raises Conflict while a job that has not ended uses it."""
        raise NotImplementedError

    def rows(self, ref: str) -> Iterator[dict[str, Any]]:
        """The rows in file order, JSON types as uploaded."""
        raise NotImplementedError

    def path(self, ref: str) -> str:
        """Where the canonical JSON lines lie in the artifacts (for downloads). Raises NotFound."""
        raise NotImplementedError
