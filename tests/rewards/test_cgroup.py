"""Groups of processes: where they may be made, that the kernel enforces them, and that they go away."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from rewardsmith.rewards.sandbox import cgroup

V1_MOUNTS = """
25 23 0:22 / /sys rw - sysfs sysfs rw
29 28 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
30 28 0:27 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
31 28 0:28 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
32 28 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
""".strip()
V1_GROUPS = "9:name=systemd:/\n8:pids:/\n4:memory:/user/me\n2:cpu,cpuacct:/\n0::/user.slice"
V2_MOUNTS = "34 26 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot"
# cgroups of a container that share their numbering with the machine: only its own part is mounted.
BOUND_MOUNTS = "34 26 0:30 /docker/abc /sys/fs/cgroup ro,nosuid - cgroup2 cgroup2 rw"


@pytest.mark.parametrize(
    ("mounts", "groups", "controller", "folder"),
    [
        (V1_MOUNTS, V1_GROUPS, "memory", "/sys/fs/cgroup/memory/user/me"),
        (V1_MOUNTS, V1_GROUPS, "pids", "/sys/fs/cgroup/pids"),
        (V1_MOUNTS, V1_GROUPS, "cpu", "/sys/fs/cgroup/cpu,cpuacct"),
        (V1_MOUNTS, V1_GROUPS, "", "/sys/fs/cgroup/unified/user.slice"),
        (V1_MOUNTS, V1_GROUPS, "hugetlb", None),
        (V2_MOUNTS, "0::/system.slice/server.service", "", "/sys/fs/cgroup/system.slice/server.service"),
        (V2_MOUNTS, "0::/", "", "/sys/fs/cgroup"),
        (V2_MOUNTS, "0::/", "memory", None),
        (BOUND_MOUNTS, "0::/docker/abc/leaf", "", "/sys/fs/cgroup/leaf"),
        (BOUND_MOUNTS, "0::/docker/abcdef", "", None),
    ],
)
def test_the_folder_of_this_process(mounts: str, groups: str, controller: str, folder: str | None) -> None:
    assert cgroup.find(mounts, groups, controller) == (None if folder is None else Path(folder))


def v2_group(folder: Path, available: str, shared_out: str) -> Path:
    folder.mkdir()
    (folder / "cgroup.controllers").write_text(available)
    (folder / "cgroup.subtree_control").write_text(shared_out)
    return folder


def test_a_v2_group_shares_out_what_it_was_given(tmp_path: Path) -> None:
    group = v2_group(tmp_path / "group", "cpu memory pids\n", "memory\n")
    assert cgroup.divisible(group) == group
    assert (group / "cgroup.subtree_control").read_text() == "+pids"


def test_a_v2_group_that_was_given_nothing_is_named(tmp_path: Path) -> None:
    group = v2_group(tmp_path / "group", "cpu\n", "")
    with pytest.raises(OSError, match=r"was not given the controllers: memory, pids") as raised:
        cgroup.divisible(group)
    assert raised.value.errno == errno.ENODEV


@pytest.fixture
def group() -> cgroup.Cgroup:
    try:
        made = cgroup.make(32 * 2**20, 10)
    except OSError as error:
        pytest.skip(f"no group can be made here: {error}")
    yield made
    made.remove()
    assert not any(folder.exists() for folder in made.folders)


def run_in(group: cgroup.Cgroup, script: str) -> subprocess.CompletedProcess[str]:
    joining = "".join(f"echo 0 >{file}; " for file in group.joins)
    return subprocess.run(["sh", "-c", joining + script], capture_output=True, text=True)


def test_memory_of_all_is_bounded_and_the_kill_is_counted(group: cgroup.Cgroup) -> None:
    assert group.memory_kills() == 0
    done = run_in(group, "python3 -c 'print(len(b\"x\" * 2**26))' ; echo $?")
    assert done.stdout.strip() == "137"
    assert group.memory_kills() == 1


def test_the_number_of_processes_is_bounded(group: cgroup.Cgroup) -> None:
    done = run_in(group, "for i in $(seq 40); do sleep 20 & done; jobs -p | wc -l")
    assert "fork" in done.stderr.lower()
    assert group.memory_kills() == 0


def test_removing_ends_what_is_inside(group: cgroup.Cgroup) -> None:
    joining = "".join(f"echo 0 >{file}; " for file in group.joins)
    process = subprocess.Popen(["sh", "-c", f"{joining}setsid sleep 60 & echo ready; sleep 60"], stdout=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    group.remove()
    assert process.wait(10) == -9
    assert process.stdout.read() == ""  # the other one is gone as well
    process.stdout.close()


def test_what_a_killed_server_left_is_removed_by_the_next_and_what_lives_is_not(group: cgroup.Cgroup) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [folder.parent / f"{cgroup.PREFIX}{gone.pid}-0" for folder in group.folders]
    for folder in left:
        folder.mkdir()
    again = cgroup.make(2**25, 4)
    try:
        assert not any(folder.exists() for folder in left)
        assert all(folder.exists() for folder in group.folders)
    finally:
        again.remove()


def test_names_do_not_repeat(group: cgroup.Cgroup) -> None:
    again = cgroup.make(2**25, 4)
    again.remove()
    assert again.memory.name != group.memory.name
    assert again.memory.name.startswith(f"{cgroup.PREFIX}{os.getpid()}-")
