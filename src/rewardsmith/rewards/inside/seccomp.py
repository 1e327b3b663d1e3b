"""The system calls that the kernel refuses to this process and its children: a BPF filter, written here by hand.

A refused call fails with EPERM; code that checks for that goes on. A call through another architecture's numbers, for
which this table would be wrong, ends the process. Everything not named here stays allowed.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

from . import kernel

# name: (number on x86_64, number on aarch64), None where that architecture lacks it.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # looking into other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "lookup_dcookie": (212, 18),
    # large parts of the kernel that rewards have no use for
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "lsm_set_self_attr": (460, 460),
    "modify_ldt": (154, None), "uselib": (134, None), "sysfs": (139, None), "_sysctl": (156, None),
    "nfsservctl": (180, 42), "personality": (135, 92), "syslog": (103, 116), "vhangup": (153, 58),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "open_tree": (428, 428), "open_tree_attr": (467, 467), "move_mount": (429, 429), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # the machine as a whole
    "create_module": (174, None), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "ioperm": (173, None), "iopl": (172, None),
    # memory that no limit of a process counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
}  # fmt: skip

# Where the sandbox shares mounts, processes and network with the machine, and may be the same user.
REFUSED_WITHOUT_NAMESPACES: dict[str, tuple[int | None, int | None]] = {
    # all network; socketpair stays
    "socket": (41, 198),
    # so that killing one process group reaches everything
    "setsid": (112, 157), "setpgid": (109, 154),
    # of files it cannot open: Landlock does not stop these
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "file_setattr": (469, 469), "inotify_add_watch": (254, 27),
    # the priority of other processes of the user
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274),
}  # fmt: skip

# Allowed for some values of an argument only.
IOCTL, CLONE, CLONE3, SOCKET, SOCKETPAIR = (16, 29), (56, 220), (435, 435), (41, 198), (53, 199)
PRLIMIT, SCHED_SETAFFINITY = (302, 261), (203, 122)
FORK, VFORK = (57, None), (58, None)
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # put words into a terminal's mouth
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW* of clone's flags
UNIX, INET, INET6 = 1, 2, 10
THIS_PROCESS = 0

# machine: (column of the tables, what the kernel calls the architecture)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32 = 0x40000000  # numbers from here on are x86_64 calls with 32-bit pointers

NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

Step = tuple[int, int, int, int]  # operation, steps to skip if true, steps to skip if false, constant


def install(namespaces: bool) -> None:
    """Put the filter on this thread and what it starts; no_new_privs must be set.

    `namespaces`: the sandbox has its own mounts, processes and network. Raises OSError when the kernel refuses, and
    RuntimeError for a machine without a table or when the filter does not bite.
    """
    _put_on(program(namespaces, os.uname().machine))
    try:
        kernel.syscall(number("unshare"), 0)
    except PermissionError:
        return
    raise RuntimeError("the filter was accepted and filters nothing")


def refuse_processes() -> None:
    """No process and no thread from here on: forking fails with EAGAIN, as at a limit. `install` comes before this."""
    column, _ = MACHINES[os.uname().machine]
    forks = [call for call in (numbers[column] for numbers in (CLONE, FORK, VFORK)) if call is not None]
    compared = [(EQUAL, len(forks) - place, 0, call) for place, call in enumerate(forks)]
    _put_on([(LOAD, 0, 0, NUMBER), *compared, _answer(ALLOW), _answer(REFUSE | errno.EAGAIN)])


def _put_on(steps: Sequence[Step]) -> None:
    code = b"".join(struct.pack("<HBBI", *step) for step in steps)
    pointer = ctypes.cast(ctypes.create_string_buffer(code, len(code)), ctypes.c_void_p)
    header = struct.pack("@HP", len(steps), pointer.value)
    kernel.prctl(kernel.SET_SECCOMP, 2, ctypes.create_string_buffer(header, len(header)))


def number(name: str) -> int:
    """The number of a refused call on this machine. KeyError where there is none."""
    column, _ = MACHINES[os.uname().machine]
    found = REFUSED[name][column]
    if found is None:
        raise KeyError(name)
    return found


def program(namespaces: bool, machine: str) -> list[Step]:
    """The filter as BPF steps. Raises RuntimeError for a machine whose numbers are not known."""
    if machine not in MACHINES or struct.calcsize("P") != 8:
        raise RuntimeError(f"there is no table of system calls for {machine} ({8 * struct.calcsize('P')} bit)")
    column, architecture = MACHINES[machine]
    refused = REFUSED if namespaces else REFUSED | REFUSED_WITHOUT_NAMESPACES
    special: list[tuple[tuple[int, int], list[Step]]] = [
        (IOCTL, _by_argument(1, (TIOCSTI, TIOCLINUX), REFUSE | errno.EPERM, ALLOW)),
        (CLONE, [_argument(0), (HAS_BITS, 0, 1, NEW_NAMESPACES), _answer(REFUSE | errno.EPERM), _answer(ALLOW)]),
        # Its flags lie behind a pointer that a filter cannot follow; ENOSYS makes the C library use clone.
        (CLONE3, [_answer(REFUSE | errno.ENOSYS)]),
        (SOCKETPAIR, _by_argument(0, (UNIX,), ALLOW, REFUSE | errno.EPERM)),
    ]
    if namespaces:
        special.append((SOCKET, _by_argument(0, (UNIX, INET, INET6), ALLOW, REFUSE | errno.EPERM)))
    else:
        special += [
            (numbers, _by_argument(0, (THIS_PROCESS,), ALLOW, REFUSE | errno.EPERM))
            for numbers in (PRLIMIT, SCHED_SETAFFINITY)
        ]
    steps: list[Step] = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), _answer(KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":
        steps += [(AT_LEAST, 0, 1, X32), _answer(KILL)]
    for numbers, body in special:
        steps += [(EQUAL, 0, len(body), numbers[column]), *body]
    for call in (of_both[column] for of_both in refused.values()):
        if call is not None:
            steps += [(EQUAL, 0, 1, call), _answer(REFUSE | errno.EPERM)]
    return [*steps, _answer(ALLOW)]


def _by_argument(index: int, values: tuple[int, ...], if_among: int, if_not: int) -> list[Step]:
    compared = [(EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [_argument(index), *compared, _answer(if_not), _answer(if_among)]


def _argument(index: int) -> Step:
    """Its lower half, which is all of an int, a pid or clone's flags."""
    return LOAD, 0, 0, ARGUMENTS + 8 * index


def _answer(action: int) -> Step:
    return RETURN, 0, 0, action
