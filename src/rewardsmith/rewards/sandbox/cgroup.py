"""The memory and the processes of a whole sandbox, bounded by a control group where this process may make one.

A group is made inside the group that this process is in, so that a sandbox never gets more than the server has. The
first process of the sandbox joins it and then starts the rest: `joins` are the files it writes to. cgroup v1 and v2.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

PREFIX = "rewardsmith-"
EXTRA_PROCESSES = 8  # bubblewrap, the shell that starts it, the zygote
SECONDS_TO_EMPTY = 2.0

_numbers = count()


@dataclass(frozen=True)
class Cgroup:
    """One folder of cgroup v2, or one each for memory and pids of v1."""

    memory: Path
    pids: Path

    @property
    def folders(self) -> list[Path]:
        return list(dict.fromkeys((self.memory, self.pids)))

    @property
    def joins(self) -> list[str]:
        """A process that writes 0 to each of these is in the group, and so is what it starts then."""
        return [str(folder / "cgroup.procs") for folder in self.folders]

    def memory_kills(self) -> int:
        """How many processes of the group the kernel has ended because its memory was used up."""
        for name in ("memory.events", "memory.oom_control"):
            with suppress(FileNotFoundError):
                lines = (self.memory / name).read_text().splitlines()
                return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
        return 0

    def remove(self) -> None:
        """Kill what is in the group, wait for its end, take the group away.

        One that does not end within 2 s stays; making the next group removes it.
        """
        give_up = time.monotonic() + SECONDS_TO_EMPTY
        for folder in self.folders:
            while folder.exists():
                _kill_members(folder)
                with suppress(OSError):
                    folder.rmdir()
                    break
                if time.monotonic() > give_up:
                    return
                time.sleep(0.002)


def make(memory_bytes: int, processes: int) -> Cgroup:
    """A new group with these limits, swap not counted on top. Raises OSError where none can be made, saying why."""
    memory, pids = _parents()
    name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
    group = Cgroup(memory / name, pids / name)
    made = []
    try:
        for folder in group.folders:
            _remove_left_over(folder.parent)
            folder.mkdir()
            made.append(folder)
        if group.memory == group.pids:
            (group.memory / "memory.max").write_text(str(memory_bytes))
            _write_if_there(group.memory / "memory.swap.max", "0")
        else:
            (group.memory / "memory.limit_in_bytes").write_text(str(memory_bytes))
            _write_if_there(group.memory / "memory.memsw.limit_in_bytes", str(memory_bytes))
        (group.pids / "pids.max").write_text(str(processes + EXTRA_PROCESSES))
    except OSError:
        for folder in made:
            folder.rmdir()
        raise
    return group


def _parents() -> tuple[Path, Path]:
    """The folders for memory and for pids under which this process may make groups."""
    mounts = Path("/proc/self/mountinfo").read_text()
    memberships = Path("/proc/self/cgroup").read_text()
    memory, pids = find(mounts, memberships, "memory"), find(mounts, memberships, "pids")
    if memory and pids:
        return memory, pids
    unified = find(mounts, memberships, "")
    if unified is None:
        raise OSError(errno.ENOENT, "no cgroup file system is mounted")
    parent = divisible(unified)
    return parent, parent


def find(mounts: str, memberships: str, controller: str) -> Path | None:
    """The folder of this process in the hierarchy of a v1 controller, or in v2's for "".

    `mounts` and `memberships` are the texts of mountinfo and cgroup in /proc/self.
    """
    own = None
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = path
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        root, mounted_at = left.split()[3:5]
        if kind != ("cgroup" if controller else "cgroup2") or (controller and controller not in options.split(",")):
            continue
        if own is not None and (own + "/").startswith(root.rstrip("/") + "/"):
            return Path(mounted_at, own.removeprefix(root.rstrip("/")).lstrip("/"))
    return None


def divisible(own: Path) -> Path:
    """The v2 group that may have groups with limits below it: our own, or the one made for the server as a whole.

    A group with processes in it cannot share out memory (EBUSY). Whoever runs servers therefore starts them in a leaf
    of a group that is theirs: a systemd unit with Delegate=yes and DelegateSubgroup=, or a leaf made in a container.
    """
    try:
        return _share_out(own)
    except OSError as error:
        if error.errno != errno.EBUSY or not _is_ours(own.parent):
            raise
    return _share_out(own.parent)


def _share_out(group: Path) -> Path:
    missing = {"memory", "pids"} - set((group / "cgroup.subtree_control").read_text().split())
    lacking = missing - set((group / "cgroup.controllers").read_text().split())
    if lacking:
        raise OSError(errno.ENODEV, f"the group {group} was not given the controllers: {', '.join(sorted(lacking))}")
    if missing:
        (group / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(missing)))
    return group


def _is_ours(group: Path) -> bool:
    """Whether what is above our own group was handed to this server, so that no limit is escaped by using it."""
    for mark in ("trusted.delegate", "user.delegate"):  # systemd sets them
        with suppress(OSError):
            return os.getxattr(group, mark) == b"1"
    # The top of a container's own view; that of the machine itself has no such file.
    return not (group.parent / "cgroup.procs").exists() and (group / "cgroup.events").exists()


def _remove_left_over(parent: Path) -> None:
    """Groups of servers that were killed. Only empty ones can be removed."""
    for folder in parent.glob(f"{PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(PREFIX).split("-")[0]).exists():
            with suppress(OSError):
                folder.rmdir()


def _kill_members(folder: Path) -> None:
    with suppress(OSError):
        for line in (folder / "cgroup.procs").read_text().split():
            if int(line) > 0:  # 0 is a process that this one cannot see
                with suppress(ProcessLookupError):
                    os.kill(int(line), signal.SIGKILL)


def _write_if_there(path: Path, text: str) -> None:
    if path.exists():
        path.write_text(text)
