"""Packages for reward functions: requirement lines become a lock, and a lock becomes a folder to import from.

What this interpreter's own environment has already is used as it is. Anything else is resolved to exact versions with
hashes, and installed to a folder that all jobs with the same lock share; `installer` runs the programs that do this.
Folders are published whole or not at all, are never changed afterwards, and go, the least recently used first, when all
together grow too large; one that is in use stays. Nothing of a package runs here: that happens in the sandbox.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import site
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Self

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from rewardsmith.errors import ConfigError, PackageError
from rewardsmith.rewards import installer

MOST_LINES, LONGEST_LINE = 100, 500
LARGEST_BYTES = 5 * 2**30  # of one environment
KEPT_BYTES = 20 * 2**30  # of all of them together
DRAFT, ABANDONED_SECONDS = "draft-", 3600.0
_FILES = (".whl", ".zip", ".egg", ".tar", ".gz", ".bz2", ".xz", ".tgz", ".txt", ".toml", ".cfg")


@dataclass
class Environment:
    """`folders` to import from. `lock` says exactly what is in them, empty for this interpreter's own environment.

    While it is open nobody removes the folders.
    """

    folders: list[Path]
    lock: str = ""
    _kept: IO[str] | None = field(default=None, repr=False)

    def close(self) -> None:
        if self._kept:
            self._kept.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def versions(self) -> list[str]:
        """`name version` of each package that was installed."""
        pinned = (line.partition("==") for line in self.lock.splitlines() if "==" in line)
        return [f"{name} {rest.split()[0]}" for name, _, rest in pinned]


def requirements(lines: Iterable[str]) -> list[str]:
    """The lines in one fixed form, without those whose marker does not hold here.

    Raises ConfigError for one that is more than a name with extras, versions and a marker, and for a name that comes
    twice.
    """
    found: dict[str, str] = {}
    lines = list(lines)
    if len(lines) > MOST_LINES:
        raise ConfigError(f"reward_fns.runtime.packages has {len(lines)} lines, more than the {MOST_LINES} it may have")
    for line in lines:
        where = f"reward_fns.runtime.packages: {line[:LONGEST_LINE]!r}"
        requirement = _parsed(line, where)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        name = canonicalize_name(requirement.name)
        if name in found:
            raise ConfigError(f"{where} names {name} a second time; write one line for it")
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        found[name] = f"{name}{extras}{requirement.specifier}"
    return sorted(found.values())


def _parsed(line: str, where: str) -> Requirement:
    text = line.strip()
    if len(text) > LONGEST_LINE:
        raise ConfigError(f"{where}... is too long for a requirement")
    if text.startswith("-"):
        raise ConfigError(f"{where} is an option of pip; name packages only, such as 'sympy>=1.13'")
    if "://" in text or " @ " in text or text.lower().startswith(("file:", "git+")):
        raise ConfigError(f"{where} is a URL; name a package of the package index, such as 'sympy>=1.13'")
    if "/" in text or "\\" in text or text.startswith(".") or text.lower().endswith(_FILES):
        raise ConfigError(f"{where} is a path; name a package of the package index, such as 'sympy>=1.13'")
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where} is no requirement line such as 'sympy>=1.13': {reason}") from None
    if requirement.url:
        raise ConfigError(f"{where} is a URL; name a package of the package index, such as 'sympy>=1.13'")
    return requirement


def at_hand(lines: Iterable[str]) -> Environment | None:
    """The environment for these lines if nothing has to be installed for it, else None. Raises ConfigError."""
    wanted = requirements(lines)
    if own := _own(wanted):
        return own
    with suppress(OSError):  # there is none, or it is being made
        lock = (_cache() / "locks" / _name_of(wanted)).read_text()
        return _existing(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return None


def open_environment(lines: Iterable[str], tell: installer.Tell, lock: str = "") -> Environment:
    """An environment with these packages, installed if need be. `tell` gets what the installer says, line by line, and
    an empty line now and then; what it raises ends the installation.

    With a `lock`, which an earlier environment had, it is exactly that one. Raises ConfigError for wrong lines and
    PackageError, with the installer's reason, when they cannot be installed.
    """
    wanted = requirements(lines)
    if not lock and (own := _own(wanted)):
        return own
    try:
        cache = _cache()
        if not lock:
            lock = installer.resolve(wanted, tell)
            _replace(cache / "locks" / _name_of(wanted), lock)
        while (environment := _existing(lock, fcntl.LOCK_SH)) is None:
            with _place_of(lock, fcntl.LOCK_EX) as place:
                if not place.folders[0].is_dir():
                    _install(place, tell)
        _remove_oldest(cache)
        return environment
    except OSError as error:
        raise PackageError(f"packages for the reward functions cannot be installed: {error}") from None


# ---- this interpreter's own environment


def _own(wanted: Sequence[str]) -> Environment | None:
    folders = [Path(folder) for folder in site.getsitepackages()]
    return Environment(folders) if all(_is_here(Requirement(line), folders) for line in wanted) else None


def _is_here(requirement: Requirement, folders: Sequence[Path]) -> bool:
    """Where sandboxes look, which is not all that this process could import. Of extras, what they need as well."""
    found = metadata.distributions(name=requirement.name, path=[str(folder) for folder in folders])
    distribution = next(iter(found), None)
    if distribution is None or not requirement.specifier.contains(distribution.version, prereleases=True):
        return False
    needed = [Requirement(line) for line in (distribution.requires or []) if requirement.extras]
    return all(
        _is_here(other, folders)
        for other in needed
        for extra in requirement.extras
        if other.marker and other.marker.evaluate({"extra": extra}) and not other.marker.evaluate({"extra": ""})
    )


# ---- environments that were installed: <cache>/<key>/ with the packages, <cache>/<key>.lock with the size of that


def _cache() -> Path:
    """In the user's cache, where no sandbox can write and nobody else may. Raises OSError."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(root, "rewardsmith", "environments")
    (folder / "locks").mkdir(mode=0o755, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise OSError(f"{folder} can be written by other users; remove it, or set XDG_CACHE_HOME")
    return folder


def _name_of(wanted: Sequence[str]) -> str:
    return hashlib.sha256("\n".join([_python(), *wanted]).encode()).hexdigest()


def _python() -> str:
    return f"{sys.implementation.cache_tag} {sysconfig.get_platform()}"


def _place_of(lock: str, how: int) -> Environment:
    """Where the environment of a lock is or will be. `how`: kept from those who would remove it, or from everybody."""
    folder = _cache() / hashlib.sha256(f"{_python()}\n{lock}".encode()).hexdigest()[:32]
    kept = open(f"{folder}.lock", "a+")  # noqa: SIM115 - Environment.close
    try:
        fcntl.flock(kept, how)
    except OSError:
        kept.close()
        raise
    return Environment([folder], lock, kept)


def _existing(lock: str, how: int) -> Environment | None:
    """The environment of a lock, marked as used now; None when it was not made yet, or was removed."""
    place = _place_of(lock, how)
    if place.folders[0].is_dir():
        os.utime(f"{place.folders[0]}.lock")
        return place
    place.close()
    return None


def _install(place: Environment, tell: installer.Tell) -> None:
    """For whoever has the place alone."""
    folder = place.folders[0]
    draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=folder.parent))
    try:
        installer.install(place.lock, draft / "packages", tell)
        size = _seal(draft / "packages")
        if size > LARGEST_BYTES:
            raise PackageError(
                f"the packages for the reward functions take {size / 2**30:.1f} GiB, more than the "
                f"{LARGEST_BYTES / 2**30:.0f} GiB that one set may have"
            )
        Path(f"{folder}.lock").write_text(str(size))
        (draft / "packages").rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _seal(folder: Path) -> int:
    """Readable by the users of sandboxes, whatever the umask here, and not to be written; the answer is its bytes."""
    size = 0
    folder.chmod(0o755)
    for above, folders, files in os.walk(folder):
        for name in folders:
            os.chmod(os.path.join(above, name), 0o755)
        for name in files:
            path = os.path.join(above, name)
            about = os.stat(path)
            size += about.st_size
            os.chmod(path, about.st_mode & 0o111 | 0o444)
    return size


def _remove_oldest(cache: Path) -> None:
    """As many as it takes to stay within KEPT_BYTES, and none that is in use; and what a killed process left behind."""
    for draft in cache.glob(f"{DRAFT}*"):
        if draft.stat().st_mtime < time.time() - ABANDONED_SECONDS:
            shutil.rmtree(draft, ignore_errors=True)
    used = [file for file in cache.glob("*.lock") if file.with_suffix("").is_dir()]
    sizes = {file: int(file.read_text() or 0) for file in used}
    total = sum(sizes.values())
    for file in sorted(used, key=lambda file: file.stat().st_mtime):
        if total <= KEPT_BYTES:
            return
        with file.open("a+") as kept, suppress(BlockingIOError):
            fcntl.flock(kept, fcntl.LOCK_EX | fcntl.LOCK_NB)
            away = Path(tempfile.mkdtemp(prefix=DRAFT, dir=cache))
            file.with_suffix("").rename(away / "packages")  # gone at once, not file by file
            shutil.rmtree(away)
            total -= sizes[file]


def _replace(file: Path, text: str) -> None:
    """Whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as draft:
        draft.write(text)
    os.replace(draft.name, file)
