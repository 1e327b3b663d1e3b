"""What the probe plants for its attacks, and whether anything happened to it, seen from outside.

A file with a secret, a folder that everybody may write to, listeners on the loopback and in the file system, a process
with a secret in its environment. All are harmless, on this machine only, and gone in the end.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SECRET_MODE = 0o644  # so that it is the sandbox that keeps it from other users, not the mode


class Bait:
    """Use it as a context manager. `targets` is what the attacks must know; `touched` names those that got through."""

    def __init__(self) -> None:
        self._held = ExitStack()
        self._name = f"planted-{secrets.token_hex(8)}"

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            folder = Path(tempfile.mkdtemp(prefix="rewardsmith-probe-"))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.chmod(0o755)
            self._secret, self._drop, unix = folder / "secret", folder / "drop", folder / "socket"
            self._secret.write_text(self._name)
            self._secret.chmod(SECRET_MODE)
            self._drop.mkdir()
            self._drop.chmod(0o777)
            loopback, abstract = ("127.0.0.1", 0), f"\0{self._name}"
            self._tcp = undo.enter_context(_listener(socket.AF_INET, socket.SOCK_STREAM, loopback))
            self._udp = undo.enter_context(_listener(socket.AF_INET, socket.SOCK_DGRAM, loopback))
            self._unix = undo.enter_context(_listener(socket.AF_UNIX, socket.SOCK_STREAM, str(unix)))
            self._abstract = undo.enter_context(_listener(socket.AF_UNIX, socket.SOCK_STREAM, abstract))
            unix.chmod(0o777)
            self._victim = subprocess.Popen(["sleep", "60"], env={"SECRET": self._name}, stdin=subprocess.DEVNULL)
            undo.callback(self._victim.wait)
            undo.callback(self._victim.kill)
            self._held = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.close()

    @property
    def targets(self) -> dict[str, Any]:
        return {
            "name": self._name,
            "secret": str(self._secret),
            "folders": [str(self._drop), "/", "/usr/lib", "/etc", "/dev", "/harness/inside"],
            "tcp": self._tcp.getsockname()[1],
            "udp": self._udp.getsockname()[1],
            "unix": self._unix.getsockname(),
            "victim": self._victim.pid,
        }

    def touched(self) -> Iterator[str]:
        """The attacks whose traces are here, whatever they said themselves."""
        for attack, listener in (
            ("connect_by_tcp", self._tcp),
            ("connect_to_a_socket_file", self._unix),
            ("connect_to_an_abstract_socket", self._abstract),
        ):
            try:
                listener.accept()[0].close()
                yield attack
            except BlockingIOError:
                pass
        try:
            self._udp.recv(1)
            yield "send_by_udp"
        except BlockingIOError:
            pass
        if self._victim.poll() is not None:
            yield "signal_a_process"
        if any(self._drop.iterdir()):
            yield "write_a_file"
        if stat.S_IMODE(self._secret.lstat().st_mode) != SECRET_MODE:
            yield "change_the_mode_of_a_file"


def _listener(family: socket.AddressFamily, kind: socket.SocketKind, address: Any) -> socket.socket:
    listener = socket.socket(family, kind)
    try:
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen()
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
