"""How a sandbox is started: the command line of each tier, and the plan by which its first process hardens itself.

`launch` makes what must exist before (a cgroup, a user id, the few files of /etc) and runs nothing. With bubblewrap
(S3, S2) the sandbox sees the system's libraries, the interpreter, the package folders and `inside`, all read-only, and
a /tmp and /dev/shm of its own; without it (S1, S1w) the same list is what Landlock lets it read, and it writes to the
scratch folder. Every step fails closed: what a tier needs and cannot get is an error, never left out.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardsmith.errors import SandboxError
from rewardsmith.rewards.sandbox import cgroup as cgroups
from rewardsmith.rewards.sandbox import users
from rewardsmith.rewards.sandbox.cgroup import Cgroup
from rewardsmith.rewards.sandbox.limits import Limits
from rewardsmith.rewards.sandbox.tiers import Tier
from rewardsmith.wire import JOB_MARKER

INSIDE = Path(__file__).parents[1] / "inside"
HARNESS = "/harness"  # where bubblewrap puts the folder above `inside`

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store")
SETTINGS = ("/etc/ld.so.cache", "/etc/localtime", "/etc/ssl/certs", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
HARDENED_LIMITS = ("memory_bytes", "file_bytes", "open_files", "processes")
INNER_UID = 1000  # in a user namespace, where it stands for the server's own

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "USER": "reward",
    "PYTHONHASHSEED": "0",  # the order of sets, and so a score made from one, is the same in every executor
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
}

_PYTHON = "import sys; sys.path.insert(0, {harness!r}); from inside import {program}; sys.path.pop(0); {program}.main()"


@dataclass(frozen=True)
class Launch:
    """What Popen needs, and the plan for `inside.harden`. Holds a cgroup, a user id and descriptors until `close`."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    plan: dict[str, Any]
    pass_fds: tuple[int, ...]
    cgroup: Cgroup | None
    held: ExitStack

    def memory_kills(self) -> int:
        """How many processes the kernel has ended because the sandbox's memory was used up; 0 without a cgroup."""
        return self.cgroup.memory_kills() if self.cgroup else 0

    def close(self) -> None:
        """Give everything back, when the process has ended or was never started. Kills what is left in the cgroup."""
        self.held.close()


def launch(
    tier: Tier,
    limits: Limits,
    *,
    control_fd: int,
    order_fd: int,
    site_dirs: Sequence[Path],
    environment: Mapping[str, str],
    scratch: Path | None,
    program: str = "zygote",
    proc: bool = True,
    connect: Sequence[int] = (),
) -> Launch:
    """Prepare to start `inside/<program>.py` in a sandbox of this tier, with `site_dirs` readable.

    `environment` is set when the process is hardened, so that nobody else sees it and it changes nothing before.
    `scratch`, which S1 and lower need, is a new folder made directly in the temporary folder: it is given to the user
    of the sandbox. `proc`: with a /proc of its own. `connect`: ports of its own network, which it has from S2 on, that
    it may open TCP connections to. Raises SandboxError, and OSError when S3's cgroup cannot be made.
    """
    boxed, confined = tier >= Tier.S2, tier > Tier.S0
    if connect and not boxed:
        raise SandboxError(f"a sandbox of tier {tier} has no network of its own, so it gets none")
    if scratch is None and not boxed:
        raise ValueError(f"tier {tier} needs a scratch folder")
    home = "/tmp" if boxed else str(scratch)
    python = interpreter()
    readable = [*_interpreter_folders(python), *site_dirs]
    with ExitStack() as undo:
        uid = None
        if confined and os.geteuid() == 0 and (boxed or users.may_leave(python, INSIDE, home, *readable)):
            uid, keeper = users.take()
            undo.enter_context(keeper)
        cgroup = _cgroup(tier, limits) if confined else None
        if cgroup:
            undo.callback(cgroup.remove)
        files: list[int] = []
        if boxed:
            for text in _etc(INNER_UID if uid is None else uid).values():
                files.append(_file(text))
                undo.callback(os.close, files[-1])
            command = _bubblewrap(limits, readable, files, uid is not None, proc)
            paths: dict[str, Any] = {"least": 0, "read": ["/"], "write": ["/tmp", "/dev/shm", "/dev/null"]}
        else:
            command = []
            seen: list[str | Path] = [*SYSTEM, *SETTINGS, *DEVICES, *readable, INSIDE]
            paths = {"least": 6 if tier >= Tier.S1 else 1, "read": _existing(seen), "write": [home, "/dev/null"]}
            if uid is not None:
                os.chown(home, uid, uid)
        harness = HARNESS if boxed else str(INSIDE.parent)
        start = [str(python), "-s", "-S", "-P", "-B", "-c", _PYTHON.format(harness=harness, program=program)]
        marker = {name: value for name, value in environment.items() if name == JOB_MARKER}
        return Launch(
            argv=[*_shell(cgroup), *command, *start, str(control_fd), str(order_fd)],
            env={**ENVIRONMENT, **marker, "HOME": home, "TMPDIR": home},
            cwd="/" if boxed else home,
            plan={
                "confined": confined,
                "namespaces": boxed,
                "uid": uid,
                "shared_user": uid is None and not boxed,
                "parent": os.getpid() if not boxed and sys.platform == "linux" else None,
                "limits": {name: getattr(limits, name) for name in HARDENED_LIMITS},
                "landlock": {**paths, "connect": list(connect)} if confined else None,
                "environment": {name: value for name, value in environment.items() if name != JOB_MARKER},
            },
            pass_fds=(control_fd, order_fd, *files),
            cgroup=cgroup,
            held=undo.pop_all(),
        )


def interpreter() -> Path:
    """The Python that runs inside: this one, without the virtual environment around it."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def _shell(cgroup: Cgroup | None) -> list[str]:
    """Joins the cgroup, has the kernel take this process first when memory runs out, becomes what comes behind `--`.

    In a process between: Python may not run code between fork and exec while other threads do.
    """
    if sys.platform != "linux":
        return []
    script = (
        'while [ "$1" != -- ]; do echo 0 >"$1" || exit 126; shift; done; shift; '
        'echo 1000 2>/dev/null >/proc/self/oom_score_adj; exec "$@"'
    )
    return ["/bin/sh", "-c", script, "sh", *(cgroup.joins if cgroup else []), "--"]


def _bubblewrap(limits: Limits, readable: Sequence[Path], files: Sequence[int], root: bool, proc: bool) -> list[str]:
    """bubblewrap and its options; mounts come in the order in which they must be made. Raises SandboxError."""
    command = shutil.which("bwrap")
    if command is None:
        raise SandboxError("bubblewrap is not installed")
    if os.stat(command).st_mode & stat.S_ISUID:
        raise SandboxError(f"{command} is setuid, which makes its bugs everybody's way to root")
    options = ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
    options += [f"--unshare-{name}" for name in ("pid", "net", "ipc", "uts", "cgroup")]
    if root:  # the first process needs these to become another user, and then drops them
        options += [word for name in ("SETUID", "SETGID", "SETPCAP") for word in ("--cap-add", f"CAP_{name}")]
    else:
        options += ["--unshare-user", "--uid", str(INNER_UID), "--gid", str(INNER_UID)]
    options += ["--proc", "/proc"] if proc else []
    # Of its own, --dev would give half of the machine's memory to be written to.
    options += ["--dev", "/dev", *_memory_folder("/dev/shm", limits.shm_bytes)]
    options += _memory_folder("/tmp", limits.tmp_bytes)
    folders, mounts = {Path("/"), Path("/tmp"), Path("/dev"), Path("/dev/shm")}, set[Path]()
    for path in map(Path, _existing([*SYSTEM, *SETTINGS, *readable])):
        if mounts.isdisjoint(path.parents):
            at_top = path.is_symlink() and path.parent == Path("/")
            options += [*_parents(path, folders), *(_link(path) if at_top else ("--ro-bind", str(path), str(path)))]
            mounts.add(path)
    inside = Path(HARNESS, INSIDE.name)
    options += [*_parents(inside, folders), "--ro-bind", str(INSIDE), str(inside)]
    for path, fd in zip(map(Path, _etc(0)), files, strict=True):
        options += [*_parents(path, folders), "--perms", "0444", "--ro-bind-data", str(fd), str(path)]
    return [command, *options, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _memory_folder(path: str, size: int) -> list[str]:
    return ["--perms", "1777", "--size", str(size), "--tmpfs", path]


def _link(path: Path) -> tuple[str, ...]:
    """As on the machine: /lib is a link to /usr/lib on most."""
    return "--symlink", os.readlink(path), str(path)


def _parents(path: Path, made: set[Path]) -> Iterator[str]:
    """The folders above that are not there yet. bubblewrap would make them for root only."""
    for parent in reversed(path.parents):
        if parent not in made:
            made.add(parent)
            yield from ("--perms", "0755", "--dir", str(parent))


def _etc(uid: int) -> dict[str, str]:
    return {
        "/etc/passwd": f"reward:x:{uid}:{uid}::/tmp:/bin/sh\n",
        "/etc/group": f"reward:x:{uid}:\n",
        "/etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    }


def _file(text: str) -> int:
    fd = os.memfd_create("rewardsmith-etc", os.MFD_CLOEXEC)
    os.write(fd, text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _cgroup(tier: Tier, limits: Limits) -> Cgroup | None:
    """Below S3 one is used where it can be had, and not relied on."""
    try:
        return cgroups.make(limits.sandbox_bytes, limits.processes)
    except OSError:
        if tier == Tier.S3:
            raise
        return None


def _interpreter_folders(python: Path) -> list[Path]:
    return [python.parent, Path(sys.base_prefix, "lib"), Path(sys.base_prefix, "lib64")]


def _existing(paths: Iterable[str | Path]) -> list[str]:
    return [str(path) for path in dict.fromkeys(map(str, paths)) if os.path.exists(path)]
