"""The job's files in the artifact store: paths relative to one URL, written once under paths that name the attempt.

Two attempts never write the same path, so a process that should be dead cannot change what its successor reads. What
a file holds is the business of `segments`, `checkpoint` and `data`.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from rewardsmith.errors import JobError
from rewardsmith.wire import JobSpec


class JobArtifacts:
    """Reads any artifact, writes those of one attempt: `jobs/<uuid>/<folder>/<name>-<fence>...`."""

    def __init__(self, spec: JobSpec) -> None:
        """Raises JobError for a URL that cannot be opened."""
        parts = urlsplit(spec.artifacts_url)
        try:
            local = parts.scheme == "file"
            self._store = LocalStore(unquote(parts.path), mkdir=True) if local else from_url(spec.artifacts_url)
        except (BaseError, ValueError) as error:
            raise JobError(f"artifacts {spec.artifacts_url} cannot be opened: {error}") from None
        self._home = f"jobs/{spec.uuid}"
        self._fence = spec.fence

    def path(self, folder: str, name: str, ending: str = "") -> str:
        return f"{self._home}/{folder}/{name}-{self._fence}{ending}"

    def put(self, path: str, content: bytes) -> None:
        """Raises JobError, also for a path that holds something else; a file is there whole or not at all."""
        try:
            obstore.put(self._store, path, content, mode="create")
        except AlreadyExistsError:
            # A store tries again by itself when the answer to a write was lost, and then finds its own file.
            if self.get(path) != content:
                raise JobError(f"artifact {path} is there already, with another content") from None
        except (BaseError, OSError) as error:
            raise JobError(f"artifact {path} cannot be written: {error}") from error

    def get(self, path: str) -> bytes:
        """Raises JobError."""
        try:
            return bytes(obstore.get(self._store, path).bytes())
        except (BaseError, OSError) as error:
            raise JobError(f"artifact {path} cannot be read: {error}") from error

    def list(self, folder: str) -> list[str]:
        """Paths of all files under a folder of this job, all attempts' ones, sorted."""
        return sorted(file["path"] for page in obstore.list(self._store, f"{self._home}/{folder}") for file in page)

    def delete(self, path: str) -> None:
        try:
            obstore.delete(self._store, path)
        except FileNotFoundError:
            pass  # gone already
        except (BaseError, OSError) as error:
            raise JobError(f"artifact {path} cannot be deleted: {error}") from error

    def fetch_folder(self, folder: str, names: tuple[str, ...], into: Path) -> None:
        """Copies files of a folder to the local disk. Raises JobError."""
        for name in names:
            (into / name).write_bytes(self.get(f"{folder}/{name}"))
