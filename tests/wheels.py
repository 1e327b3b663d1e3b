"""A package index of tiny packages that are made on the spot, served on this machine."""

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Index:
    """`add` packages, then point an installer to `url`. `asked` are the files that were fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Pages, self, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def add(
        self, name: str, version: str, files: Mapping[str, str] | None = None, requires: Sequence[str] = ()
    ) -> None:
        """A wheel; without files it has one module of its name, with its version in it."""
        files = dict(files or {f"{name}.py": f"version = {version!r}\n"})
        about = f"{name}-{version}.dist-info"
        needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
        files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        files[f"{about}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        files[f"{about}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"])
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as wheel:
            for path, text in files.items():
                wheel.writestr(zipfile.ZipInfo(path, (2024, 1, 1, 0, 0, 0)), text)
        self._publish(name, f"{name}-{version}-py3-none-any.whl", content.getvalue())

    def add_source(self, name: str, version: str, setup: str) -> None:
        """A source distribution, whose setup.py is run by who builds it."""
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            for path, text in {"setup.py": setup, "PKG-INFO": about}.items():
                entry = tarfile.TarInfo(f"{name}-{version}/{path}")
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text.encode()))
        self._publish(name, f"{name}-{version}.tar.gz", content.getvalue())

    def _publish(self, name: str, file: str, content: bytes) -> None:
        folder = self.folder / name.replace("_", "-")
        folder.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
        links = [
            f'<a href="{path.name}#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}">{path.name}</a>'
            for path in sorted(folder.iterdir())
            if path.name != "index.html"
        ]
        (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>")


class _Pages(SimpleHTTPRequestHandler):
    def __init__(self, index: Index, *arguments: Any, **settings: Any) -> None:
        self.index = index
        super().__init__(*arguments, **settings)

    def do_GET(self) -> None:
        self.index.asked.append(self.path)
        super().do_GET()

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Index]:
    index = Index(folder)
    thread = threading.Thread(target=index.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield index
    finally:
        index.server.shutdown()
        index.server.server_close()
        thread.join()
