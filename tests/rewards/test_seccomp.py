"""The system call filter: its tables against the C headers, its steps in a BPF machine, the kernel's own verdict."""

import errno
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rewardsmith.rewards.inside import seccomp
from rewardsmith.rewards.sandbox.build import INSIDE

MACHINES = ("x86_64", "aarch64")
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
TABLES = {**seccomp.REFUSED, **seccomp.REFUSED_WITHOUT_NAMESPACES}
ALLOWED = {"x86_64": {"read": 0, "openat": 257, "futex": 202}, "aarch64": {"read": 63, "openat": 56, "futex": 98}}
REFUSED, NO_SUCH = seccomp.REFUSE | errno.EPERM, seccomp.REFUSE | errno.ENOSYS


def verdict(machine: str, number: int, *arguments: int, namespaces: bool = True, other: int | None = None) -> int:
    """What the filter says of one call, step by step as the kernel would. `other`: as another architecture."""
    words = [number, seccomp.MACHINES[machine][1] if other is None else other, 0]
    data = struct.pack("<IIQ6Q", *words, *arguments, *[0] * (6 - len(arguments)))
    steps = seccomp.program(namespaces, machine)
    loaded = at = 0
    while True:
        operation, if_true, if_false, constant = steps[at]
        at += 1
        if operation == seccomp.LOAD:
            (loaded,) = struct.unpack_from("<I", data, constant)
        elif operation == seccomp.RETURN:
            return constant
        else:
            holds = {
                seccomp.EQUAL: loaded == constant,
                seccomp.AT_LEAST: loaded >= constant,
                seccomp.HAS_BITS: bool(loaded & constant),
            }[operation]
            at += if_true if holds else if_false


def of(machine: str, numbers: tuple[int, int]) -> int:
    return numbers[seccomp.MACHINES[machine][0]]


@pytest.mark.parametrize("machine", MACHINES)
def test_the_tables_agree_with_the_headers_of_this_machine(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip("no C headers here")
    pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)$"
    known = {name: int(number) for name, number in re.findall(pattern, HEADERS[machine].read_text(), re.MULTILINE)}
    column, _ = seccomp.MACHINES[machine]
    newest = max(known.values())
    for name, numbers in TABLES.items():
        expected = known.get(name)
        if expected is None and (numbers[column] or 0) > newest:
            continue  # newer than the headers
        assert numbers[column] == expected, name
    for name in ("ioctl", "clone", "clone3", "socket", "socketpair", "sched_setaffinity"):
        assert of(machine, getattr(seccomp, name.upper())) == known[name]
    assert of(machine, seccomp.PRLIMIT) == known["prlimit64"]


@pytest.mark.parametrize("machine", MACHINES)
def test_no_number_stands_for_two_calls(machine: str) -> None:
    column, _ = seccomp.MACHINES[machine]
    numbers = [of_both[column] for of_both in TABLES.values() if of_both[column] is not None]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("namespaces", [True, False])
def test_what_is_in_the_tables_is_refused_and_the_rest_is_not(machine: str, namespaces: bool) -> None:
    column, _ = seccomp.MACHINES[machine]
    for name, numbers in TABLES.items():
        if numbers[column] is None or name == "socket":
            continue
        expected = REFUSED if name in seccomp.REFUSED or not namespaces else seccomp.ALLOW
        assert verdict(machine, numbers[column], namespaces=namespaces) == expected, name
    for name, number in ALLOWED[machine].items():
        assert verdict(machine, number, namespaces=namespaces) == seccomp.ALLOW, name


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_that_depend_on_an_argument(machine: str) -> None:
    def asked(numbers: tuple[int, int], *arguments: int, namespaces: bool = True) -> int:
        return verdict(machine, of(machine, numbers), *arguments, namespaces=namespaces)

    for family in range(64):
        expected = seccomp.ALLOW if family in (1, 2, 10) else REFUSED
        assert asked(seccomp.SOCKET, family) == expected, family
        assert asked(seccomp.SOCKET, family, namespaces=False) == REFUSED, family
    assert asked(seccomp.SOCKETPAIR, 1, namespaces=False) == seccomp.ALLOW
    assert asked(seccomp.SOCKETPAIR, 30) == REFUSED
    assert asked(seccomp.CLONE, 0x11) == asked(seccomp.CLONE, 0x3D0F00) == seccomp.ALLOW  # fork, a thread
    for flag in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert asked(seccomp.CLONE, flag | 0x11) == REFUSED, hex(flag)
    assert asked(seccomp.CLONE3) == NO_SUCH
    assert asked(seccomp.IOCTL, 1, 0x5412) == asked(seccomp.IOCTL, 1, 0x541C) == REFUSED
    assert asked(seccomp.IOCTL, 1, 0xFFFFFFFF00005412) == REFUSED  # the kernel drops the upper half
    assert asked(seccomp.IOCTL, 1, 0x5401) == seccomp.ALLOW
    for call in (seccomp.PRLIMIT, seccomp.SCHED_SETAFFINITY):
        assert asked(call, 0, namespaces=False) == seccomp.ALLOW
        assert asked(call, 4321, namespaces=False) == REFUSED
        assert asked(call, 4321) == seccomp.ALLOW


def test_numbers_of_another_architecture_end_the_process() -> None:
    for machine in MACHINES:
        assert verdict(machine, 0, other=0x40000003) == seccomp.KILL
    assert verdict("x86_64", seccomp.X32 + 1) == verdict("x86_64", 0xFFFFFFFF) == seccomp.KILL


def test_a_machine_without_a_table_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no table of system calls for riscv64"):
        seccomp.program(True, "riscv64")


TRIES = """
import errno, json, os, socket, subprocess, sys
found = {}
def attempt(name, what):
    try:
        what()
        found[name] = "done"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
kernel.prctl(kernel.SET_NO_NEW_PRIVS, 1)
seccomp.install(sys.argv[1] == "namespaces")
attempt("unshare", lambda: kernel.syscall(seccomp.number("unshare"), 0x10000000))
attempt("memfd", lambda: os.memfd_create("x"))
attempt("setsid", os.setsid)
attempt("tcp", lambda: socket.socket().close())
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close())
attempt("socketpair", lambda: [end.close() for end in socket.socketpair()])
attempt("chmod", lambda: os.chmod("/tmp/there-is-no-such-file", 0o600))
attempt("subprocess", lambda: subprocess.run(["true"], check=True))
import threading
thread = threading.Thread(target=lambda: found.update(thread="done"))
thread.start()
thread.join()
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is in Linux only")
@pytest.mark.parametrize("namespaces", [True, False])
def test_the_kernel_takes_the_filter_and_python_goes_on(namespaces: bool) -> None:
    program = f"import sys; sys.path.insert(0, {str(INSIDE.parent)!r}); from inside import kernel, seccomp\n" + TRIES
    how = "namespaces" if namespaces else "none"
    done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "unshare": "EPERM",
        "memfd": "EPERM",
        "setsid": "done" if namespaces else "EPERM",
        "tcp": "done" if namespaces else "EPERM",
        "netlink": "EPERM",
        "socketpair": "done",
        "chmod": "ENOENT" if namespaces else "EPERM",
        "subprocess": "done",
        "thread": "done",
    }
