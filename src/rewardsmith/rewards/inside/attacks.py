"""What the probe tries inside a sandbox to learn what it stops: small attacks that mean no harm.

Each returns what it got away with, having taken it back, or raises what stopped it. `trial` runs them; the targets
are planted, and looked at again, by `sandbox.bait` outside.
"""

import errno
import mmap
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from . import harden, kernel, seccomp

SECONDS = 5  # that one attack may take
LEFT_BEHIND_SECONDS = 10
CLONE_NEWUSER = 0x10000000
PTRACE_ATTACH, PTRACE_DETACH = 16, 17
KERNEL_DOORS = (
    "io_uring_setup", "bpf", "perf_event_open", "userfaultfd", "keyctl", "open_by_handle_at", "memfd_create", "shmget",
    "process_vm_readv", "pidfd_getfd", "kcmp",
)  # fmt: skip
OTHER_FAMILIES = {"netlink": 16, "packet": 17, "Bluetooth": 31, "AF_ALG": 38, "vsock": 40}

Targets = dict[str, Any]


# ---- files ----------------------------------------------------------------------------------------------------------


def read_a_file(targets: Targets) -> str:
    with open(targets["secret"]) as file:
        return f"read {len(file.read())} characters"


def write_a_file(targets: Targets) -> str:
    refused: OSError | None = None
    for folder in targets["folders"]:
        path = os.path.join(folder, targets["name"])
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except OSError as error:
            refused = refused or error
            continue
        os.unlink(path)
        return f"wrote to {folder}"
    raise refused or RuntimeError("nowhere to write")


def change_the_mode_of_a_file(targets: Targets) -> str:
    os.chmod(targets["secret"], 0o600)
    return "done"


def fill_temporary_files(targets: Targets) -> str:
    made = []
    try:
        for number in range(2 * targets["tmp_bytes"] // targets["file_bytes"]):
            made.append(os.path.join(os.environ["TMPDIR"], f"{targets['name']}-{number}"))
            with open(made[-1], "wb") as file:
                file.write(bytes(targets["file_bytes"]))
    finally:
        for path in made:
            os.unlink(path)
    return f"wrote {len(made)} files, {2 * targets['tmp_bytes']} bytes"


# ---- network --------------------------------------------------------------------------------------------------------


def connect_by_tcp(targets: Targets) -> str:
    with socket.create_connection(("127.0.0.1", targets["tcp"]), SECONDS):
        return "connected"


def send_by_udp(targets: Targets) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", targets["udp"]))
        sender.send(b"first")
        sender.send(b"second")  # fails when nobody listened to the first
    return "sent"


def connect_to_a_socket_file(targets: Targets) -> str:
    return _connect(targets["unix"])


def connect_to_an_abstract_socket(targets: Targets) -> str:
    return _connect("\0" + targets["name"])


def _connect(address: str) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
    return "connected"


def open_another_kind_of_socket(targets: Targets) -> str:
    for name, family in OTHER_FAMILIES.items():
        try:
            socket.socket(family, socket.SOCK_DGRAM).close()
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT):
                continue
        return f"a {name} socket is allowed"
    raise PermissionError(errno.EPERM, "all refused")


# ---- other processes ------------------------------------------------------------------------------------------------


def signal_a_process(targets: Targets) -> str:
    _outsider(targets)
    os.kill(targets["victim"], signal.SIGUSR1)
    return "sent"


def see_a_process(targets: Targets) -> str:
    if str(_outsider(targets)) in os.listdir("/proc"):
        return "listed"
    raise ProcessLookupError(errno.ESRCH, "not listed")


def read_an_environment(targets: Targets) -> str:
    refused: OSError | None = None
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if targets["name"].encode() in file.read():
                    return "found the planted variable"
        except OSError as error:
            refused = error
    raise refused or ProcessLookupError(errno.ESRCH, "no process has it")


def trace_a_process(targets: Targets) -> str:
    number = seccomp.number("ptrace")
    kernel.syscall(number, PTRACE_ATTACH, _outsider(targets), 0, 0)
    os.waitpid(targets["victim"], 0x40000000)  # __WALL
    kernel.syscall(number, PTRACE_DETACH, targets["victim"], 0, 0)
    return "attached"


def change_the_limits_of_a_process(targets: Targets) -> str:
    resource.prlimit(_outsider(targets), resource.RLIMIT_CORE, (0, 0))
    return "done"


def signal_the_parent_when_enclosed(targets: Targets) -> str:
    """As model text in `run_python` would."""
    parent = os.getppid()
    enclosed = harden.enclose(["/"], [])
    os.kill(parent, 0)
    return "allowed" if enclosed else "allowed, there is no Landlock"


def leave_a_process_behind(targets: Targets) -> str:
    """It keeps the channel to the probe open, which shows from outside whether it is gone in the end.

    A process namespace ends all that is in it; without one, nothing may leave the group of processes that is killed.
    """
    if not targets["namespaces"]:
        with suppress(PermissionError):
            os.setsid()
            return "left its process group"
    if not os.fork():
        signal.alarm(0)
        time.sleep(LEFT_BEHIND_SECONDS)
        os._exit(0)
    raise RuntimeError("gone when the sandbox ended")


def _outsider(targets: Targets) -> int:
    victim: int = targets["victim"]
    if victim in (1, os.getpid(), os.getppid()):
        raise ProcessLookupError(errno.ESRCH, "its number is one of ours")
    return victim


# ---- the kernel -----------------------------------------------------------------------------------------------------


def unshare_a_namespace(targets: Targets) -> str:
    kernel.syscall(seccomp.number("unshare"), CLONE_NEWUSER)
    return "became root of a new user namespace"


def clone_a_namespace(targets: Targets) -> str:
    column, _ = seccomp.MACHINES[os.uname().machine]
    if not kernel.syscall(seccomp.CLONE[column], CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0):
        os._exit(0)
    os.wait()
    return "started a process in a new user namespace"


def open_doors_of_the_kernel(targets: Targets) -> str:
    """A filter refuses before the kernel looks at the arguments, which are all wrong."""
    for name in KERNEL_DOORS:
        try:
            kernel.syscall(seccomp.number(name), 0, 0, 0, 0, 0, 0)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOSYS):
                continue
        return f"{name} is allowed"
    raise PermissionError(errno.EPERM, "all refused")


def gain_privileges(targets: Targets) -> str:
    if held := kernel.capabilities():
        return f"has capabilities {held:#x}"
    if os.getuid() == 0:
        raise RuntimeError("root without any capability")
    os.setuid(0)
    return "became root"


# ---- resources ------------------------------------------------------------------------------------------------------


def take_memory(targets: Targets) -> str:
    """Asks for more than its share and touches none of it."""
    with mmap.mmap(-1, targets["memory_bytes"] * 3 // 2) as block:
        return f"got {len(block)} bytes"


def take_memory_in_many_processes(targets: Targets) -> str:
    count, each = 4, targets["sandbox_bytes"] // 2
    ready, release, children = os.pipe(), os.pipe(), []
    for _ in range(count):
        if child := os.fork():
            children.append(child)
            continue
        for fd in (ready[0], release[1]):
            os.close(fd)
        held = b"x" * each
        os.write(ready[1], held[:1])
        os.close(ready[1])
        os.read(release[0], 1)
        os._exit(0)
    os.close(ready[1])
    while os.read(ready[0], 1):
        pass
    os.close(release[1])
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    if failed:
        raise RuntimeError(f"{failed} of {count} processes were ended")
    return f"{count} processes held {count * each} bytes"


def start_many_processes(targets: Targets) -> str:
    read_end, write_end = os.pipe()
    children = []
    try:
        for _ in range(2 * targets["processes"]):
            child = os.fork()
            if not child:
                os.close(write_end)
                os.read(read_end, 1)
                os._exit(0)
            children.append(child)
    except BlockingIOError:
        raise RuntimeError(f"stopped after {len(children)}") from None
    finally:
        os.close(write_end)
        for child in children:
            os.waitpid(child, 0)
    return f"{len(children)} at once"


ATTACKS: tuple[Callable[[Targets], str], ...] = (
    signal_a_process,  # first: while few of our own have numbers that it could hit
    see_a_process,
    read_an_environment,
    change_the_limits_of_a_process,
    trace_a_process,
    read_a_file,
    write_a_file,
    change_the_mode_of_a_file,
    connect_by_tcp,
    send_by_udp,
    connect_to_a_socket_file,
    connect_to_an_abstract_socket,
    open_another_kind_of_socket,
    unshare_a_namespace,
    clone_a_namespace,
    open_doors_of_the_kernel,
    gain_privileges,
    signal_the_parent_when_enclosed,
    take_memory,
    start_many_processes,
    take_memory_in_many_processes,
    fill_temporary_files,
    leave_a_process_behind,
)
