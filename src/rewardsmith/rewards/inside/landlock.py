"""Landlock: the kernel lets this process and its children use the named files only, and no TCP.

Where the kernel knows how (ABI 6, Linux 6.12) they also cannot signal a process outside, nor reach an abstract UNIX
socket. What it cannot refuse in any version (chmod, chown, utime, chdir, stat of any path) is up to `seccomp`. A second
call confines further and never less.
"""

import os
import stat
import struct
import sys
from collections.abc import Iterable
from ctypes import create_string_buffer

from . import kernel

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
ASK_VERSION, PATH_BENEATH, NET_PORT = 1, 1, 2
NEWEST_ABI = 7  # of those this file knows; 7 only added flags for the audit log

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << bit for bit in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

READ = EXECUTE | READ_FILE | READ_DIR
CHANGE = WRITE_FILE | TRUNCATE | REFER | REMOVE_DIR | REMOVE_FILE
WRITE = READ | CHANGE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM  # no devices
OF_A_FILE = EXECUTE | READ_FILE | WRITE_FILE | TRUNCATE

# (first ABI that knows them, rights): what a ruleset takes away unless a rule gives it back.
FILE_RIGHTS = ((1, (1 << 13) - 1), (2, REFER), (3, TRUNCATE), (5, IOCTL_DEV))
CONNECT = 0b10
TCP_RIGHTS = ((4, 0b01 | CONNECT),)  # bind, connect
SCOPES = ((6, 0b11),)  # abstract UNIX sockets, signals
ATTRIBUTE_BYTES = ((6, 24), (4, 16), (1, 8))  # how much of the struct each ABI takes


def abi() -> int:
    """The version of Landlock that this kernel has, 0 when it has none or has it switched off."""
    if sys.platform != "linux":
        return 0
    try:
        return kernel.syscall(CREATE_RULESET, None, 0, ASK_VERSION)
    except OSError:
        return 0


def restrict(read: Iterable[str], write: Iterable[str], connect: Iterable[int] = ()) -> int:
    """Confine this thread and what it starts to these files and the folders below them, and to TCP connections to these
    ports; the answer is the ABI used.

    no_new_privs must be set. Raises OSError when a path cannot be opened or the kernel refuses.
    """
    version = min(abi(), NEWEST_ABI)
    handled, tcp = _known(FILE_RIGHTS, version), _known(TCP_RIGHTS, version)
    attribute = struct.pack("<QQQ", handled, tcp, _known(SCOPES, version))
    size = next((size for first, size in ATTRIBUTE_BYTES if version >= first), 0)
    ruleset = kernel.syscall(CREATE_RULESET, create_string_buffer(attribute), size, 0)
    try:
        for path in read:
            _allow(ruleset, path, READ & handled)
        for path in write:
            _allow(ruleset, path, WRITE & handled)
        for port in connect if tcp else ():
            rule = create_string_buffer(struct.pack("<QQ", CONNECT, port))
            kernel.syscall(ADD_RULE, ruleset, NET_PORT, rule, 0)
        kernel.syscall(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return version


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= OF_A_FILE
        kernel.syscall(ADD_RULE, ruleset, PATH_BENEATH, create_string_buffer(struct.pack("<Qi", rights, fd)), 0)
    finally:
        os.close(fd)


def _known(rights: tuple[tuple[int, int], ...], version: int) -> int:
    return sum(bits for first, bits in rights if version >= first)
