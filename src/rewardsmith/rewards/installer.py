"""Runs the program that finds and installs packages: uv, or pip where there is no uv. Wheels only.

A wheel is unpacked and nothing in it is run; building from source would run what its author wrote, outside any sandbox.
Where packages come from is the administrator's business: the programs read their own settings, such as UV_INDEX_URL and
PIP_INDEX_URL, from the environment and from the files of this user and machine.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rewardsmith.errors import PackageError

SECONDS = 600.0  # for one run of the program
REASON_LINES = 15

# Gets each line that the program says, and an empty one now and then: what it raises ends the program.
Tell = Callable[[str], None]


def resolve(requirements: Sequence[str], tell: Tell) -> str:
    """The lock: exact versions of all packages and of what they need, each with its hashes. Raises PackageError."""
    with tempfile.TemporaryDirectory(prefix="rewardsmith-packages-") as name:
        folder = Path(name)
        wanted, lock, report = folder / "wanted.txt", folder / "lock.txt", folder / "report.json"
        wanted.write_text("".join(f"{line}\n" for line in requirements))
        if uv := _uv():
            options = ["--generate-hashes", "--no-header", "--no-annotate", "--no-build", "--output-file", str(lock)]
            _run([uv, "pip", "compile", *options, "--python", sys.executable, str(wanted)], folder, tell)
            return lock.read_text()
        tell("uv is not installed; pip does the same more slowly")
        options = ["--dry-run", "--ignore-installed", "--report", str(report), "--only-binary", ":all:"]
        _run([*_pip(), "install", *options, "-r", str(wanted)], folder, tell)
        return _lock_of(json.loads(report.read_text()))


def install(lock: str, folder: Path, tell: Tell) -> None:
    """Exactly what the lock says, to a new folder. Raises PackageError."""
    with tempfile.TemporaryDirectory(prefix="rewardsmith-packages-") as name:
        file = Path(name, "lock.txt")
        file.write_text(lock)
        exactly = ["--require-hashes", "--no-deps", "--target", str(folder), "-r", str(file)]
        if uv := _uv():
            # Copies: files that are shared with uv's cache would change there, too, if anything could change them here.
            options = ["--no-build", "--link-mode", "copy", "--compile-bytecode", "--python", sys.executable]
            _run([uv, "pip", "install", *options, *exactly], Path(name), tell)
        else:
            _run([*_pip(), "install", "--only-binary", ":all:", *exactly], Path(name), tell)


def _uv() -> str | None:
    """The one beside this interpreter first: that is the one this package was tested with."""
    return shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "--no-color"]


def _lock_of(report: dict[str, object]) -> str:
    """pip's report of what it would install, in the form that it takes."""
    lines = []
    installed = report["install"]
    assert isinstance(installed, list)
    for item in installed:
        about, hashes = item["metadata"], item["download_info"].get("archive_info", {}).get("hashes", {})
        if item["is_direct"] or "sha256" not in hashes:
            raise PackageError(f"{about['name']} does not come from a package index; it cannot be installed")
        lines.append(f"{about['name']}=={about['version']} --hash=sha256:{hashes['sha256']}\n")
    return "".join(sorted(lines, key=str.lower))


def _run(command: list[str], folder: Path, tell: Tell) -> None:
    """In a folder of its own, so that no project's settings apply. Raises PackageError with the last lines."""
    settings = {"NO_COLOR": "1", "UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never", "PYTHONUNBUFFERED": "1"}
    last: deque[str] = deque(maxlen=REASON_LINES)
    with subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        assert process.stdout
        try:
            for line in _lines(process.stdout.fileno()):
                tell(line)
                if line:
                    last.append(line)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, TimeoutError):
                raise
            last.append(f"this took longer than {SECONDS:g} s")
    if process.returncode:
        reason = "\n".join(last) or f"the installer ended with status {process.returncode}"
        raise PackageError(f"packages for the reward functions cannot be installed:\n{reason}")


def _lines(pipe: int) -> Iterator[str]:
    """What is written to it, and an empty line in every half second of silence. Raises TimeoutError."""
    give_up, rest = time.monotonic() + SECONDS, b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while time.monotonic() < give_up:
        if not poll.poll(500):
            yield ""
        elif data := os.read(pipe, 65536):
            *lines, rest = (rest + data).split(b"\n")
            yield from (line.decode(errors="replace").rstrip() for line in lines)
        else:
            yield rest.decode(errors="replace").rstrip()
            return
    raise TimeoutError
