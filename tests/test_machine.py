"""What a process may have of a machine: quotas and limits as containers, services and the kernel write them down."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rewardsmith import machine

V2 = {"proc/self/cgroup": "0::/\n"}
V1 = {"proc/self/cgroup": "4:memory:/\n2:cpu,cpuacct:/\n1:name=systemd:/\n0::/\n"}
NESTED = {"proc/self/cgroup": "0::/system.slice/jobs.service\n"}

Write = Callable[[dict[str, str]], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Puts files in place of those of the kernel: a machine of 8 cores without control groups, at first."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def written(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return written


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        (V2, 8),
        (V2 | {"cgroup/cpu.max": "max 100000\n"}, 8),
        (V2 | {"cgroup/cpu.max": "200000 100000\n"}, 2),
        (V2 | {"cgroup/cpu.max": "150000 100000\n"}, 2),
        (V2 | {"cgroup/cpu.max": "20000 100000\n"}, 1),
        (V2 | {"cgroup/cpu.max": "6400000 100000\n"}, 8),
        (V1 | {"cgroup/cpu/cpu.cfs_quota_us": "-1\n", "cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8),
        (V1 | {"cgroup/cpu/cpu.cfs_quota_us": "250000\n", "cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 3),
        (NESTED | {"cgroup/system.slice/jobs.service/cpu.max": "400000 100000"}, 4),
        (
            NESTED
            | {
                "cgroup/system.slice/jobs.service/cpu.max": "max 100000",
                "cgroup/system.slice/cpu.max": "300000 100000",
            },
            3,
        ),
        # A container that knows itself by the host's path, and one that was moved out of what it can see.
        ({"proc/self/cgroup": "0::/docker/0123abc\n", "cgroup/cpu.max": "500000 100000"}, 5),
        ({"proc/self/cgroup": "0::/../../other\n", "cgroup/cpu.max": "500000 100000"}, 5),
    ],
)
def test_cores_are_those_that_the_quota_pays_for(write: Write, files: dict[str, str], cores: int):
    write(files)
    assert machine.available_cores() == machine.threads() == cores


@pytest.mark.parametrize(
    ("asked", "threads"), [("1", 1), ("3", 3), ("4,2", 4), ("64", 5), ("", 5), ("0", 5), ("many", 5), ("-2", 5)]
)
def test_fewer_threads_are_taken_where_the_user_asks_for_fewer(
    write: Write, monkeypatch: pytest.MonkeyPatch, asked: str, threads: int
):
    write(V2 | {"cgroup/cpu.max": "500000 100000"})
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert machine.threads() == threads
    assert machine.available_cores() == 5


MEMINFO = {"proc/meminfo": "MemTotal:        9000 kB\nMemFree:          200 kB\nMemAvailable:    4000 kB\n"}
STAT_V2 = "anon 500000\nfile 400000\ninactive_anon 7\ninactive_file 300000\nactive_file 100000\n"
STAT_V1 = "cache 400000\ninactive_file 11\ntotal_cache 400000\ntotal_inactive_file 300000\ntotal_active_file 100000\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 4000 * 1024),
        (V2 | {"cgroup/memory.max": "max", "cgroup/memory.current": "900000"}, 4000 * 1024),
        (V2 | {"cgroup/memory.max": "1000000", "cgroup/memory.current": "900000"}, 100_000),
        # Files that were read and are not used any more make room as soon as it is wanted.
        (
            V2
            | {
                "cgroup/memory.max": "1000000",
                "cgroup/memory.current": "900000",
                "cgroup/memory.stat": STAT_V2,
            },
            400_000,
        ),
        (
            V1
            | {
                "cgroup/memory/memory.limit_in_bytes": "1000000",
                "cgroup/memory/memory.usage_in_bytes": "900000",
                "cgroup/memory/memory.stat": STAT_V1,
            },
            400_000,
        ),
        (V2 | {"cgroup/memory.max": "10000000000", "cgroup/memory.current": "900000"}, 4000 * 1024),
        (V2 | {"cgroup/memory.max": "1000000", "cgroup/memory.current": "1200000"}, 0),
        (
            NESTED
            | {
                "cgroup/system.slice/jobs.service/memory.max": "max",
                "cgroup/system.slice/jobs.service/memory.current": "5",
                "cgroup/system.slice/memory.max": "800000",
                "cgroup/system.slice/memory.current": "600000",
            },
            200_000,
        ),
    ],
)
def test_memory_is_what_machine_and_groups_leave(write: Write, files: dict[str, str], free: int):
    write(MEMINFO | files)
    assert machine.available_memory() == free


def test_a_system_that_says_nothing_is_taken_to_be_half_free(write: Write):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.available_memory() == whole // 2


def test_this_machine_says_something_sensible():
    assert 1 <= machine.available_cores() <= (os.cpu_count() or 1)
    assert 0 < machine.available_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
