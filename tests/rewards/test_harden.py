"""Hardening goes all the way or ends the process. Every plan is put on in a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from rewardsmith.rewards.inside import landlock
from rewardsmith.rewards.sandbox.build import INSIDE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="all but the limits is in Linux only")
needs_landlock = pytest.mark.skipif(landlock.abi() < 1, reason="this kernel has no Landlock")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

LIMITS = {"memory_bytes": 2**30, "file_bytes": 2**20, "open_files": 64, "processes": 16}


def plan(**changes: Any) -> dict[str, Any]:
    basis = {
        "confined": True,
        "namespaces": False,
        "uid": None,
        "shared_user": False,
        "parent": os.getpid(),
        "limits": LIMITS,
        "landlock": None,
        "environment": {},
    }
    return basis | changes


def harden(plan: dict[str, Any], program: str = "", before: str = "") -> subprocess.CompletedProcess[str]:
    code = "\n".join(
        (
            "import ctypes, json, os, resource, signal, sys, threading",
            "sys.path.insert(0, sys.argv[1])",
            "from inside import harden, kernel, landlock, seccomp",
            textwrap.dedent(before),
            "found = {'hardened': harden.harden(json.loads(sys.argv[2]))}",
            textwrap.dedent(program),
            "print(json.dumps(found))",
        )
    )
    command = [sys.executable, "-c", code, str(INSIDE.parent), json.dumps(plan)]
    return subprocess.run(command, capture_output=True, text=True)


def found(plan: dict[str, Any], program: str = "", before: str = "") -> dict[str, Any]:
    done = harden(plan, program, before)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_says_what_it_put_on() -> None:
    assert found(plan(landlock={"least": 0, "connect": [], "read": ["/"], "write": []}))["hardened"] == [
        "no capabilities",
        "ends with its supervisor",
        "resource limits",
        "no new privileges",
        *([f"Landlock ABI {min(landlock.abi(), 7)}"] if landlock.abi() else []),
        "system call filter",
        "memory closed to others",
    ]


def test_limits_privileges_and_priority() -> None:
    program = """
    for name in ("AS", "FSIZE", "NOFILE", "NPROC", "CORE"):
        found[name] = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    found |= {name: status[name].strip() for name in ("NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "CapInh", "CapAmb")}
    found["dumpable"] = kernel.prctl(3)
    found["nice"] = os.getpriority(os.PRIO_PROCESS, 0)
    """
    seen = found(plan(), program)
    assert seen["AS"] == [2**30] * 2 and seen["FSIZE"] == [2**20] * 2 and seen["NOFILE"] == [64] * 2
    assert seen["NPROC"] == [16] * 2 and seen["CORE"] == [0, 0]
    assert {seen[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
    assert (seen["NoNewPrivs"], seen["Seccomp"], seen["dumpable"]) == ("1", "2", 0)
    assert seen["nice"] >= 10


def test_a_limit_that_is_lower_already_stays() -> None:
    before = "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))"
    program = "found['files'] = resource.getrlimit(resource.RLIMIT_NOFILE)"
    assert found(plan(), program, before)["files"] == [32, 32]


def test_the_processes_that_the_user_has_already_are_counted_on_top() -> None:
    program = "found['processes'] = resource.getrlimit(resource.RLIMIT_NPROC)[0]"
    assert found(plan(shared_user=True), program)["processes"] > LIMITS["processes"]


@needs_root
def test_a_user_id_of_its_own_and_no_way_back() -> None:
    program = """
    found |= {"uids": os.getresuid(), "gids": os.getresgid(), "groups": os.getgroups()}
    try:
        os.setuid(0)
    except PermissionError:
        found["back"] = "refused"
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    found["CapBnd"] = int(status["CapBnd"], 16)
    """
    seen = found(plan(uid=1_900_000_007), program)
    assert seen["uids"] == seen["gids"] == [1_900_000_007] * 3
    assert (seen["groups"], seen["back"], seen["CapBnd"]) == ([], "refused", 0)
    assert "user id 1900000007 of its own" in seen["hardened"]


def test_variables_come_last_and_reach_children() -> None:
    program = """
    import subprocess
    found["own"] = os.environ["KEY"]
    found["child"] = subprocess.run(["sh", "-c", "echo $KEY"], capture_output=True, text=True).stdout
    found["visible"] = b"secret" in open("/proc/self/environ", "rb").read()
    """
    seen = found(plan(environment={"KEY": "secret"}), program)
    assert seen == seen | {"own": "secret", "child": "secret\n", "visible": False}


def test_without_confinement_only_limits_are_set() -> None:
    seen = found(plan(confined=False), "found['seccomp'] = 'Seccomp:\\t0' in open('/proc/self/status').read()")
    assert (seen["hardened"], seen["seccomp"]) == (["ends with its supervisor", "resource limits"], True)


def test_it_ends_with_the_process_that_started_it() -> None:
    """The parent dies without a word; the kernel ends what it started."""
    middle = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], *sys.argv[2:], str(os.getpid())],"
        " stdout=subprocess.PIPE)\n"
        "print(child.stdout.readline().decode().strip(), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    inner = (
        "import json, os, sys, time\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from inside import harden\n"
        "harden.harden(json.loads(sys.argv[2]) | {'parent': int(sys.argv[3])})\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", middle, inner, str(INSIDE.parent), json.dumps(plan())]
    # All that holds the pipes of this call must have ended before it returns.
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip().isdecimal(), done.stderr


STOPS = {
    "a thread": (
        {},
        "threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "hardening stopped: another thread runs already",
    ),
    "another parent": (
        {"parent": 1},
        "",
        "hardening stopped at parent: the process that started the sandbox has ended",
    ),
    "a Landlock that is too old": (
        {"landlock": {"least": 99, "connect": [], "read": ["/"], "write": []}},
        "",
        "hardening stopped at files: Landlock ABI 99 is needed, this kernel has",
    ),
    "a path that is gone": (
        {"landlock": {"least": 0, "connect": [], "read": ["/there/is/none"], "write": []}},
        "",
        "hardening stopped at files: [Errno 2]",
    ),
    "a user that cannot be": ({"uid": 2**32 - 1}, "", "hardening stopped at user"),
    "an unknown machine": (
        {},
        "os.uname = lambda: type('uname', (), {'machine': 'riscv64'})",
        "hardening stopped at system calls: there is no table of system calls for riscv64",
    ),
}


@needs_landlock
@pytest.mark.parametrize(("changes", "before", "says"), STOPS.values(), ids=STOPS)
def test_what_cannot_be_done_stops_it(changes: dict[str, Any], before: str, says: str) -> None:
    done = harden(plan(**changes), before=before)
    assert done.returncode != 0 and done.stdout == ""
    assert says in done.stderr.strip().splitlines()[-1]
