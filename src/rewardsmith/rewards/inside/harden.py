"""Takes rights away from the process it runs in, step by step, before anything of the user's is touched.

`harden` is called once, by the first process of a sandbox, with the plan that `sandbox.build` made outside. Each step
raises when it cannot be done: there is no way through this file that ends with less protection than the plan asks
for. What bubblewrap has done by then is not repeated here. `enclose` is for a child that runs text of the model.
"""

import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from . import kernel, landlock, seccomp

NICENESS = 10  # a step waits for generation first, for rewards second


def harden(plan: dict[str, Any]) -> list[str]:
    """Put on what the plan says, in this order; the answer names it, for people.

    Raises RuntimeError naming the step that failed; the process must end then.
    """
    if threading.active_count() > 1:
        raise RuntimeError("hardening stopped: another thread runs already, and it would keep its rights")
    done: list[str] = []
    for step in (_priority, _user, _parent, _resources, _privileges, _files, _system_calls, _memory, _environment):
        try:
            done += step(plan)
        except (OSError, RuntimeError, ValueError) as error:
            name = step.__name__.lstrip("_").replace("_", " ")
            raise RuntimeError(f"hardening stopped at {name}: {error}") from error
    return done


def enclose(read: list[str], write: list[str], connect: Sequence[int] = ()) -> bool:
    """Confine this process further: these paths and TCP ports only, no signal to its parent. False where the kernel
    cannot.

    For a forked child that has closed what it must not use. Raises OSError when a path cannot be opened.
    """
    if not landlock.abi():
        return False
    kernel.prctl(kernel.SET_NO_NEW_PRIVS, 1)
    landlock.restrict(read, write, connect)
    return True


def _priority(plan: dict[str, Any]) -> list[str]:
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    return []


def _user(plan: dict[str, Any]) -> list[str]:
    """A user id of the sandbox's own, where the plan has one; no capability in any set."""
    if not plan["confined"]:
        return []
    _empty_bounding_set()
    if plan["uid"] is not None:
        os.setgroups([])
        os.setresgid(plan["uid"], plan["uid"], plan["uid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
        if {*os.getresuid(), *os.getresgid()} != {plan["uid"]}:
            raise RuntimeError(f"user and group are still {os.getresuid()} and {os.getresgid()}")
    kernel.prctl(kernel.CAP_AMBIENT, kernel.CAP_AMBIENT_CLEAR_ALL)
    kernel.drop_capabilities()
    if kernel.capabilities():
        raise RuntimeError(f"capabilities are left: {kernel.capabilities():#x}")
    own = [] if plan["uid"] is None else [f"user id {plan['uid']} of its own"]
    return [*own, "no capabilities"]


def _empty_bounding_set() -> None:
    """So that no program brings a capability back. no_new_privs says the same, also to those who may not do this."""
    for capability in range(64):
        try:
            kernel.prctl(kernel.CAPBSET_DROP, capability)
        except OSError:
            return  # past the last one of this kernel, or not allowed


def _parent(plan: dict[str, Any]) -> list[str]:
    """End with the supervisor. After the change of user, which forgets it; bubblewrap does this where it is used."""
    if plan["parent"] is None:
        return []
    kernel.prctl(kernel.SET_PDEATHSIG, signal.SIGKILL.value)
    if os.getppid() != plan["parent"]:
        raise RuntimeError("the process that started the sandbox has ended")
    return ["ends with its supervisor"]


def _resources(plan: dict[str, Any]) -> list[str]:
    limits = plan["limits"]
    wanted = {
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform != "darwin":  # which refuses this one
        wanted[resource.RLIMIT_AS] = limits["memory_bytes"]
    if plan["confined"]:
        others = _tasks_of_this_user() if plan["shared_user"] else 0
        wanted[resource.RLIMIT_NPROC] = limits["processes"] + others
    for kind, amount in wanted.items():
        hard = resource.getrlimit(kind)[1]
        limit = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (limit, limit))
    return ["resource limits"]


def _tasks_of_this_user() -> int:
    """How many threads count against the same limit of processes as this sandbox."""
    count = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue  # it has ended
    return count


def _privileges(plan: dict[str, Any]) -> list[str]:
    if not plan["confined"]:
        return []
    kernel.prctl(kernel.SET_NO_NEW_PRIVS, 1)
    return ["no new privileges"]


def _files(plan: dict[str, Any]) -> list[str]:
    wanted = plan["landlock"]
    if wanted is None:
        return []
    version = landlock.abi()
    if version < wanted["least"]:
        raise RuntimeError(f"Landlock ABI {wanted['least']} is needed, this kernel has {version or 'none'}")
    if not version:
        return []
    return [f"Landlock ABI {landlock.restrict(wanted['read'], wanted['write'], wanted['connect'])}"]


def _system_calls(plan: dict[str, Any]) -> list[str]:
    if not plan["confined"]:
        return []
    seccomp.install(plan["namespaces"])
    return ["system call filter"]


def _memory(plan: dict[str, Any]) -> list[str]:
    """Not to be read, attached to or dumped by processes of the same user."""
    if not plan["confined"]:
        return []
    kernel.prctl(kernel.SET_DUMPABLE, 0)
    return ["memory closed to others"]


def _environment(plan: dict[str, Any]) -> list[str]:
    """Last: until here a variable could have told the loader or Python what to run."""
    os.environ.update(plan["environment"])
    return []
