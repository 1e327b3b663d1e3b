"""The files of the store behind one URL (a folder, S3, ...), through obstore. A file is written once and never changes.

Paths are relative to the URL: plain names with `/` between them. Anything else is refused before it reaches the disk,
so a path that came over HTTP cannot name a file outside.
"""

from __future__ import annotations

import re
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from rewardsmith.errors import ConfigError, Conflict, NotFound

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]*")
CACHE_BYTES = 4 * 2**30
CHUNK_BYTES = 2**20


class Artifacts:
    """Files under `url`. Methods raise ConfigError for a path that is not plain names.

    `local_root` is the folder in which every path that `fetch` gives lies.
    """

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that obstore does not know."""
        self.url = url
        parts = urlsplit(url)
        self._is_local = parts.scheme == "file"
        self._evicting = threading.Lock()
        try:
            if self._is_local:
                self.local_root = Path(unquote(parts.path))
                self._store: ObjectStore = LocalStore(self.local_root, automatic_cleanup=True, mkdir=True)
            else:
                self._store = from_url(url)
                self._copies = tempfile.TemporaryDirectory(prefix="rewardsmith-")  # goes with this object
                self.local_root = Path(self._copies.name)
        except (BaseError, ValueError) as error:
            raise ConfigError(f"artifacts URL {url!r}: {str(error).splitlines()[0]}") from None

    def put(self, path: str, data: bytes | Path) -> None:
        """Write a new file, from memory or from a local file. Raises Conflict when `path` exists."""
        try:
            self._store.put(checked(path), data, mode="create")
        except AlreadyExistsError:
            raise Conflict(f"artifact {path!r} exists; files are written once") from None

    def get(self, path: str) -> bytes:
        """Raises NotFound."""
        try:
            return bytes(self._store.get(checked(path)).bytes())
        except FileNotFoundError:
            raise NotFound(f"no artifact {path!r} under {self.url}") from None

    def exists(self, path: str) -> bool:
        try:
            self._store.head(checked(path))
        except FileNotFoundError:
            return False
        return True

    def list(self, folder: str) -> list[str]:
        """Paths of all files under `folder`, sorted."""
        return sorted(meta["path"] for batch in self._store.list(checked(folder)) for meta in batch)

    def delete(self, path: str) -> None:
        """Remove a file, or every file under a folder. What is not there is not missed."""
        for file in [path] if self.exists(path) else self.list(path):
            try:
                self._store.delete(file)
            except FileNotFoundError:
                continue  # somebody else deleted it first

    def local_path(self, path: str) -> Path | None:
        """Where a file or folder lies on this machine's disk; None when the artifacts are elsewhere."""
        here = self.local_root / checked(path)
        return here if self._is_local else None

    def fetch(self, path: str) -> Path:
        """A local file with the content: the file itself, or a copy in a bounded cache. Raises NotFound."""
        local = self.local_path(path)
        if local is not None:
            if not local.is_file():
                raise NotFound(f"no artifact {path!r} under {self.url}")
            return local
        copy = self.local_root / checked(path).replace("/", "+")
        if not copy.exists():
            content = self.get(path)
            with tempfile.NamedTemporaryFile(dir=copy.parent, delete=False) as file:
                file.write(content)
            Path(file.name).replace(copy)
            with self._evicting:
                self._evict(keep=copy)
        copy.touch()
        return copy

    def scratch(self) -> Path:
        """A private local folder for files on their way in, on the disk of the artifacts where that is local."""
        folder = self.local_root / "scratch"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def zip_folder(self, folder: str, file: BinaryIO) -> None:
        """Write a zip of every file under `folder`, names relative to it. Raises NotFound for an empty folder."""
        paths = self.list(folder)
        if not paths:
            raise NotFound(f"no artifacts in {folder!r} under {self.url}")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # weights do not compress
            for path in paths:
                with archive.open(path.removeprefix(f"{folder}/"), "w", force_zip64=True) as entry:
                    for chunk in self._store.get(path).stream(min_chunk_size=CHUNK_BYTES):
                        entry.write(chunk)

    def _evict(self, keep: Path) -> None:
        """Drop the copies that were asked for longest ago until the rest fits the cache."""
        copies = sorted((c for c in keep.parent.iterdir() if "+" in c.name), key=lambda c: c.stat().st_mtime)
        excess = sum(copy.stat().st_size for copy in copies) - CACHE_BYTES
        for copy in copies:
            if excess <= 0:
                break
            if copy != keep:
                excess -= copy.stat().st_size
                copy.unlink()


def checked(path: str) -> str:
    """`path` itself. Raises ConfigError unless it is relative and made of plain names."""
    if not all(NAME.fullmatch(name) for name in path.split("/")):
        raise ConfigError(f"artifact path {path!r}: give names of letters, digits and _ . = - with / between them")
    return path
