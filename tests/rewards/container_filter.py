"""Runs a command under the system call filter of a container: no new namespaces, no mounts. Needs no container.

python container_filter.py COMMAND ARGUMENT...
"""

import ctypes
import errno
import os
import struct
import sys

# unshare, clone, mount, setns, umount2, clone3
CALLS = {"x86_64": (272, 56, 165, 308, 166, 435), "aarch64": (97, 220, 40, 268, 39, 435)}[os.uname().machine]
NEW_NAMESPACES = 0x7E020000
ALLOW, REFUSE, NO_SUCH = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS

unshare, clone, mount, setns, umount, clone3 = CALLS
steps = [
    (0x20, 0, 0, 0),  # the number of the call
    (0x15, 8, 0, unshare),
    (0x15, 7, 0, mount),
    (0x15, 6, 0, setns),
    (0x15, 5, 0, umount),
    (0x15, 3, 0, clone3),
    (0x15, 0, 4, clone),
    (0x20, 0, 0, 16),  # its flags
    (0x45, 1, 2, NEW_NAMESPACES),
    (0x06, 0, 0, NO_SUCH),
    (0x06, 0, 0, REFUSE),
    (0x06, 0, 0, ALLOW),
]

if __name__ == "__main__":
    code = b"".join(struct.pack("<HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, header):
        sys.exit(f"the filter was refused: {os.strerror(ctypes.get_errno())}")
    os.execvp(sys.argv[1], sys.argv[1:])
