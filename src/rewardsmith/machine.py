"""What this machine lets the process have: cores and memory, within the limits of the container or service around it.

Read from the kernel each time, nothing is kept. Limits are those of Linux control groups, v2 and v1; where there are
none, and on other systems, the machine's own numbers count. GPUs are the business of `rollout.memory`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
# Of a control group, v2 and v1: its limit, what it uses, and the line of memory.stat for cached pages of files that the
# kernel gives up before anything else: they count as used, and a job that has read its model has many.
MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than its CPU quota, rounded up, pays for."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *(ceil(quota) for quota in _quotas())]))


def threads() -> int:
    """Threads for a process that computes alone: one for each core, or fewer where OMP_NUM_THREADS asks for fewer.

    It says nothing of the number of processes: ranks have one thread each in any case.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    cores = available_cores()
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    rooms = [_free_on_the_machine()]
    for group in _groups("memory"):
        for limit_file, used_file, reclaimable in MEMORY:
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is not None and used is not None:
                rooms.append(limit - used + _stat(group, reclaimable))
    return max(0, min(rooms))


def _quotas() -> Iterator[float]:
    """In cores; no quota gives none."""
    for group in _groups("cpu"):
        quota, _, period = _read(group / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = (_read(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal():  # not "max" or "-1": no limit
            yield int(quota) / int(period)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those around it; some of them may not be there.

    A container sees its own group as the root, and may know itself by a path that only the host has.
    """
    for line in _read(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        names = [name for name in path.split("/") if name]
        for depth in range(0 if ".." in names else len(names), -1, -1):
            yield root.joinpath(*names[:depth])


def _free_on_the_machine() -> int:
    for line in _read(PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _stat(group: Path, name: str) -> int:
    for line in _read(group / "memory.stat").splitlines():
        if line.split()[:1] == [name]:
            return int(line.split()[1])
    return 0


def _number(file: Path) -> int | None:
    """None without the file, and for "max": no limit."""
    text = _read(file).strip()
    return int(text) if text.isdecimal() else None


def _read(file: Path) -> str:
    """Empty when it cannot be read: most of these are not on every system."""
    try:
        return file.read_text()
    except OSError:
        return ""
