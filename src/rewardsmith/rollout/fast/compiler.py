"""Compiles a C file into a shared library and keeps it, so that this costs a second once per machine.

The library is cached in a folder that only its owner can write to (`XDG_CACHE_HOME` or ~/.cache, else a new temporary
folder), under a hash of source, flags, compiler and processor. It appears there complete or not at all.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno")
_TIMEOUT = 60.0  # seconds, of a compiler that takes one


class Unavailable(Exception):
    """Why there is no native code, in a few words."""


def load(source: Path) -> ctypes.CDLL:
    """The compiled and loaded library. Raises Unavailable."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise Unavailable("no compiler")
    try:
        text = source.read_bytes()
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_TIMEOUT, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{compiler} does not run: {error}") from None
    parts = (text, " ".join(FLAGS).encode(), compiler.encode(), version, _processor())
    name = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]
    library = _folder() / f"{source.stem}-{name}.so"
    if not _is_own(library):
        _compile(compiler, source, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise Unavailable(f"the compiled library does not load: {error}") from None


def _compile(compiler: str, source: Path, library: Path) -> None:
    handle, unfinished = tempfile.mkstemp(dir=library.parent, suffix=".part")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", unfinished, str(source), "-lm"]
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
            raise Unavailable(f"the compiler failed: {said}")
        os.chmod(unfinished, 0o600)
        os.replace(unfinished, library)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"the compiler failed: {error}") from None
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _folder() -> Path:
    """Where libraries are kept. One that others could write to would let them run code as this user."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "rewardsmith" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _is_own(folder) and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    try:
        return Path(tempfile.mkdtemp(prefix="rewardsmith-kernels-"))
    except OSError as error:
        raise Unavailable(f"no folder to compile into: {error}") from None


def _is_own(path: Path) -> bool:
    """Whether it is there, is this user's, and nobody else can write to it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022 and not stat.S_ISLNK(found.st_mode)


def _processor() -> bytes:
    """What -march=native goes by."""
    lines = {platform.machine(): None}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU implementer", "CPU part"):
                lines[line] = None
    except OSError:
        lines[platform.processor()] = None
    return "\n".join(lines).encode()
