"""Calls to the kernel that Python has no function for, through ctypes. They raise OSError like those it has."""

import ctypes
import os

SET_PDEATHSIG, SET_DUMPABLE, SET_SECCOMP, CAPBSET_DROP = 1, 4, 22, 24
SET_NO_NEW_PRIVS, CAP_AMBIENT, CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def prctl(option: int, *arguments: object) -> int:
    return _called("prctl", _libc.prctl(option, *_four(arguments)))


def syscall(number: int, *arguments: object) -> int:
    return _called(f"system call {number}", _libc.syscall(ctypes.c_long(number), *map(_argument, arguments)))


def capabilities() -> int:
    """The effective, permitted and inheritable capabilities of this process in one set: 0 means none at all."""
    sets = (ctypes.c_uint32 * 6)()
    _called("capget", _libc.capget(_this_process(), sets))
    lower, upper = sets[0] | sets[1] | sets[2], sets[3] | sets[4] | sets[5]
    return upper << 32 | lower


def drop_capabilities() -> None:
    _called("capset", _libc.capset(_this_process(), (ctypes.c_uint32 * 6)()))


def _this_process() -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)


def _four(arguments: tuple[object, ...]) -> list[object]:
    """prctl refuses some options unless the arguments it does not use are 0."""
    return [_argument(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]


def _argument(value: object) -> object:
    """Whole registers: of a plain int ctypes would set half of one."""
    return ctypes.c_long(value) if isinstance(value, int) else value


def _called(name: str, result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
