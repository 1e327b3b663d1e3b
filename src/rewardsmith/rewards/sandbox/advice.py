"""What to do about a sandbox that did not start: the words of bubblewrap, the kernel and our own steps, explained."""

from __future__ import annotations

_CONTAINER = (
    "In a container: start it with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined "
    "--security-opt systempaths=unconfined`, or a profile that allows unshare, clone and mount"
)

# (words in the error, what they mean, what to do). The first that fits counts.
KNOWN = (
    (
        ("bubblewrap is not installed",),
        "bubblewrap is not installed",
        "Install it: `apt-get install bubblewrap`, `dnf install bubblewrap`",
    ),
    (
        ("is setuid",),
        "bubblewrap is installed setuid, which makes its bugs everybody's way to root",
        "Take that away: `chmod u-s $(command -v bwrap)`",
    ),
    (
        ("RTM_NEWADDR", "setting up uid map: Permission denied"),
        "AppArmor does not let bubblewrap use user namespaces",
        "Give /usr/bin/bwrap an AppArmor profile with `userns,`, or as root: "
        "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`",
    ),
    (
        ("namespaces exceeded",),
        "no more namespaces are allowed on this machine",
        "As root: `sysctl user.max_user_namespaces=15000`, and so for the kind that is named",
    ),
    (
        ("No permissions to creat", "Creating new namespace failed", "Failed to make / slave", "pivot_root"),
        "the kernel, or the filter of a container, refuses new namespaces",
        f"{_CONTAINER}. On a machine of your own, as root: `sysctl kernel.unprivileged_userns_clone=1`",
    ),
    (
        ("Can't mount proc",),
        "/proc is partly covered, as containers do, so that the sandbox cannot have its own",
        "In a container: start it with `--security-opt systempaths=unconfined`",
    ),
    (
        ("Unknown option",),
        "bubblewrap is too old",
        "Install bubblewrap 0.8 or newer",
    ),
    (
        ("Landlock ABI",),
        "the kernel's Landlock is missing, switched off or too old",
        "Use Linux 6.12 or newer, with `landlock` in its list of security modules (/sys/kernel/security/lsm)",
    ),
    (
        ("no table of system calls",),
        "system calls can be filtered on x86_64 and aarch64 only",
        "",
    ),
    (
        ("hardening stopped at system calls",),
        "the kernel does not let system calls be filtered",
        "Use a kernel with CONFIG_SECCOMP_FILTER",
    ),
    (
        ("Device or resource busy: '/sys",),
        "the server's cgroup has processes in it and cannot be divided",
        "Start the server in a leaf of a group of its own: a systemd unit with `Delegate=yes` and "
        "`DelegateSubgroup=server`; in a container, `mkdir /sys/fs/cgroup/server && echo $$ > "
        "/sys/fs/cgroup/server/cgroup.procs` before it",
    ),
    (
        ("Read-only file system: '/sys",),
        "cgroups cannot be written to in this container",
        "Let the container have its cgroup writable (with Docker: `--cgroupns private` and a writable /sys/fs/cgroup)",
    ),
    (
        ("cgroup",),
        "this user may not make a cgroup with limits",
        "Start the server as a systemd unit with `Delegate=yes` and `DelegateSubgroup=server`",
    ),
)


def explain(error: str) -> tuple[str, str]:
    """(the reason, what to do) for what a sandbox that did not start has said."""
    said = " ".join(error.split())[:300] or "it said nothing"
    for words, reason, remedy in KNOWN:
        if any(word in error for word in words):
            return (reason if said == reason else f"{reason} ({said})"), remedy
    return f"a sandbox does not start ({said})", ""
