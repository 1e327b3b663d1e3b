"""User ids for sandboxes of a server that runs as root: one for each that runs, never one of a real user's.

A sandbox alone on its id cannot signal other processes, and its limit of processes counts only its own. Which ids are
taken is kept by the kernel: whoever has the abstract socket of that number has the id, and loses it with its process.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from rewardsmith.errors import SandboxError

# Far from what distributions, directories and containers give out; then, where a container has only 65536 ids, the
# last ones that Debian keeps reserved.
RANGES = (range(1_900_000_000, 1_900_004_096), range(65_000, 65_500))
CAP_SETGID, CAP_SETUID = 6, 7


def take() -> tuple[int, socket.socket]:
    """A user id and the socket that keeps it; closing that gives it back. Raises SandboxError when all are taken."""
    maps = [_mapped(Path("/proc/self/uid_map")), _mapped(Path("/proc/self/gid_map"))]
    for uid in (uid for numbers in RANGES for uid in numbers if all(_contains(ids, uid) for ids in maps)):
        keeper = socket.socket(socket.AF_UNIX)
        try:
            keeper.bind(f"\0rewardsmith-uid-{uid}")
        except OSError as error:
            keeper.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return uid, keeper
    raise SandboxError("no user id is left for another sandbox")


def may_leave(interpreter: Path, inside: Path, home: str, *readable: Path) -> bool:
    """Whether this root may become another user and would then still reach its files."""
    paths = (interpreter, inside, Path(home).parent, *readable)
    return _can_change_user() and all(_open_to_all(path.resolve()) for path in paths if path.exists())


def _can_change_user() -> bool:
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff"))
    return bool(held >> CAP_SETUID & held >> CAP_SETGID & 1)


def _open_to_all(path: Path) -> bool:
    """Whether every folder on the way lets others pass, and the last one lets them read."""
    return bool(os.stat(path).st_mode & 0o004) and all(os.stat(folder).st_mode & 0o001 for folder in path.parents)


def _mapped(file: Path) -> list[tuple[int, int]]:
    """(first, count) of the ids that exist in this user namespace."""
    return [(int(first), int(count)) for first, _, count in map(str.split, file.read_text().splitlines())]


def _contains(ids: list[tuple[int, int]], uid: int) -> bool:
    return any(first <= uid < first + count for first, count in ids)
