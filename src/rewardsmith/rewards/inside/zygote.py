"""The first process in a sandbox: hardens itself, loads the functions once, then forks executors as the pool asks.

It never runs a call, so what it has loaded stays as it was. Orders come over the control socket, one JSON object a
message; descriptors of a new executor come along. What an executor leaves behind when it ends is killed and reaped
here: this process is the reaper of all its descendants. Its arguments are two descriptors: the control socket, and the
order that says what to load. Standard library only.
"""

import _thread
import faulthandler
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import Any, NoReturn

from . import harden, kernel, reward_tools
from .frames import read_order
from .judge import cut, judge_error
from .loading import Function, load
from .prints import Prints
from .worker import STDERR, Executor, die

MAX_MESSAGE = 65536
SET_CHILD_SUBREAPER = 36


class Zygote:
    """`children` and `tasks` are descriptors of its own folders in /proc, opened before that was shut; -1 without."""

    def __init__(self, control: socket.socket, order: dict[str, Any], children: int, tasks: int) -> None:
        self.control, self.children, self.tasks, self.pid = control, children, tasks, os.getpid()
        self.confined: bool = order["plan"]["confined"]
        self.ports: list[int] = [order["door"]] if order["door"] else []
        self.scratch: str | None = order["scratch"]
        self.settings: dict[str, Any] = order["limits"]
        self.uses_tools = any("reward_tools" in source for _, source, _ in order["functions"])
        self.functions: list[Function] = []
        self.executors: dict[int, int] = {}  # number -> pid
        self.runners: dict[int, int] = {}

    def tell(self, **message: Any) -> None:
        try:
            self.control.send(json.dumps(message).encode())
        except OSError:
            self.end()  # the pool is gone

    # ---- loading ----------------------------------------------------------------------------------------------------

    def load(self, order: dict[str, Any]) -> None:
        """Ends the process when something cannot be loaded."""
        sys.modules["reward_tools"] = reward_tools
        for folder in order["site_dirs"]:
            self._try(-1, _add_site, folder)
        for index, (name, source, forked) in enumerate(order["functions"]):
            self.functions.append(self._try(index, load, name, source, forked))
            self.tell(loaded=index)
        if any(function.is_async for function in self.functions):
            from . import together  # noqa: F401

    def _try(self, index: int, work: Any, *arguments: Any) -> Any:
        prints = Prints(self.settings["output_bytes"])
        prints.begin()
        # Too late, the pool kills this process; a moment before that, it says where it stands.
        faulthandler.dump_traceback_later(self.settings["load_seconds"], file=STDERR)
        try:
            return work(*arguments)
        except BaseException as error:
            outcome, _, text = judge_error(error)
            self.tell(failed=index, outcome=outcome, error=cut(text).decode())
            os._exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def threads(self) -> int:
        return len(os.listdir(self.tasks)) if self.tasks >= 0 else 1 + _thread._count()

    # ---- serving ----------------------------------------------------------------------------------------------------

    def serve(self) -> NoReturn:
        gc.collect()
        gc.freeze()  # what is loaded stays shared with the executors
        kernel.prctl(SET_CHILD_SUBREAPER, 1)
        self.awake, self.wake = os.pipe()
        for end in (self.awake, self.wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        kernel.prctl(kernel.SET_PDEATHSIG, signal.SIGTERM.value)  # so that files can be removed first
        self.tell(ready=True, threads=1)
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self.awake, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self.awake and signal.SIGTERM in os.read(self.awake, 4096):
                    self.end()
                elif fd != self.awake:
                    self._obey(*self._receive())
            self._reap()

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        data, ancillary, _, _ = self.control.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(3 * 4), socket.MSG_CMSG_CLOEXEC)
        if not data:
            self.end()
        return json.loads(data), [fd for _, _, fds in ancillary for fd in struct.unpack(f"{len(fds) // 4}i", fds)]

    def _obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        number = message["number"]
        if message["do"] == "fork":
            self._fork(number, descriptors)
        elif number in self.executors:
            os.kill(self.executors[number], signal.SIGUSR2 if message["do"] == "stack" else signal.SIGKILL)

    def _fork(self, number: int, descriptors: list[int]) -> None:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) if self.uses_tools else None
        try:
            if ends:
                self.runners[number] = os.fork() or self._become_runner(*ends, descriptors)
            self.executors[number] = os.fork() or self._become_executor(descriptors, ends)
            self.tell(forked=number, pid=self.executors[number])
        except OSError as error:
            self._kill(self.runners.pop(number, 0))
            self.tell(ended=number, exit=None, signal=None, error=f"no process could be forked: {error}")
        for end in ends or ():
            end.close()
        for descriptor in descriptors:
            os.close(descriptor)

    def _reap(self) -> None:
        """Report executors that have ended, when all that they left behind is gone as well."""
        ended = []
        numbers = {pid: number for number, pid in self.executors.items()}
        with suppress(ChildProcessError):
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in numbers:
                    self._kill_group(found.si_pid)  # while it is a zombie its group is its own
                    ended.append((numbers[found.si_pid], found))
                os.waitpid(found.si_pid, 0)
        for number, _ in ended:
            del self.executors[number]
            self._kill(self.runners.pop(number, 0))
        if ended:
            self._kill_strays()
        for number, found in ended:
            own = found.si_code == os.CLD_EXITED
            self.tell(
                ended=number, exit=found.si_status if own else None, signal=None if own else found.si_status, error=""
            )

    def _kill_strays(self) -> None:
        """Children that nobody knows: what executors left behind. Those they have in turn become children by that."""
        known = {*self.executors.values(), *self.runners.values()}
        while strays := self._child_pids() - known:
            for pid in strays:
                self._kill(pid)

    def _child_pids(self) -> set[int]:
        return set(map(int, os.pread(self.children, 2**20, 0).split())) if self.children >= 0 else set()

    def _kill(self, pid: int) -> None:
        if pid:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _kill_group(self, pid: int) -> None:
        with suppress(OSError):  # it has none of its own where that is denied
            os.killpg(pid, signal.SIGKILL)

    def end(self) -> NoReturn:
        """Nothing is left but an empty scratch folder, where there is one."""
        for pid in [*self.executors.values(), *self.runners.values()]:
            self._kill_group(pid)
            self._kill(pid)
        self.executors.clear()
        self.runners.clear()
        self._kill_strays()
        if self.scratch:
            _empty(self.scratch)
        os._exit(0)

    # ---- becoming something else ------------------------------------------------------------------------------------

    def _become_executor(self, descriptors: list[int], ends: tuple[socket.socket, socket.socket] | None) -> NoReturn:
        requests, results, log = descriptors
        try:
            self._let_go(log)
            with suppress(PermissionError):  # denied where one kill of the group has to reach everything
                os.setsid()
            kernel.prctl(SET_CHILD_SUBREAPER, 1)  # a daemon is found by `has_children`
            self._enclose()
            kernel.prctl(kernel.SET_DUMPABLE, 1)  # its own /proc is its own again
            if ends:
                ends[1].close()
                reward_tools.connect(ends[0])
            self._execute(requests, results)
        except BaseException:
            die()

    def _become_runner(self, ours: socket.socket, theirs: socket.socket, descriptors: list[int]) -> NoReturn:
        try:
            self._let_go(descriptors[2])
            ours.close()
            os.close(descriptors[0])
            os.close(descriptors[1])
            reward_tools.serve(theirs, self.confined)
        except BaseException:
            die()

    def _let_go(self, log: int) -> None:
        """What a fork of this process must not have, and what it gets instead."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        kernel.prctl(kernel.SET_PDEATHSIG, signal.SIGKILL.value)
        if os.getppid() != self.pid:
            os._exit(0)
        self.control.close()
        for fd in (self.children, self.tasks, self.awake, self.wake):
            if fd >= 0:
                os.close(fd)
        os.dup2(log, 1)
        os.dup2(log, STDERR)
        os.close(log)

    def _execute(self, requests: int, results: int) -> NoReturn:
        Executor(requests, results, self.functions, self.settings, self._enclose).serve()

    def _enclose(self) -> None:
        """From now on this process can signal and trace itself alone, and what it forks."""
        if self.confined:
            harden.enclose(["/"], ["/"], self.ports)

    def serve_alone(self) -> NoReturn:
        """Threads that came with an import do not survive a fork: this process is the one executor of its sandbox."""
        self.tell(ready=True, threads=self.threads())
        message, (requests, results, log) = self._receive()
        self.tell(forked=message["number"], pid=os.getpid())
        os.dup2(log, 1)
        os.dup2(log, STDERR)
        os.close(log)
        reward_tools.connect(None, "run_python cannot be used beside a package that starts threads when it is imported")
        _thread.start_new_thread(self._obey_alone, ())
        self._execute(requests, results)

    def _obey_alone(self) -> None:
        while self.control.recv(MAX_MESSAGE, 0).find(b"stack") >= 0:
            os.kill(os.getpid(), signal.SIGUSR2)
        os._exit(128 + signal.SIGKILL)


def _add_site(folder: str) -> None:
    import site

    site.addsitedir(folder)  # runs what the folder's .pth files say


def _empty(folder: str) -> None:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    _empty(entry.path)
                    os.rmdir(entry.path)
                else:
                    os.unlink(entry.path)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _open_door(control: socket.socket, port: int) -> None:
    """A port in this sandbox's own network, which hardening would not allow to open; connections are taken outside."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        socket.send_fds(control, [b'{"door": true}'], [listener.fileno()])


def main() -> NoReturn:
    control_fd, order_fd = map(int, sys.argv[1:3])
    faulthandler.enable(STDERR)
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    order = read_order(order_fd)
    os.close(order_fd)
    zygote = Zygote(control, order, _open(f"/proc/self/task/{os.getpid()}/children"), _open("/proc/self/task"))
    try:
        if zygote.ports:
            _open_door(control, order["door"])
        # Taken out of the order: it holds the secrets of the functions, which no program of run_python is to find.
        protections = harden.harden(order.pop("plan"))
    except (OSError, RuntimeError) as error:
        zygote.tell(failed=-1, outcome="exception", error=f"the sandbox cannot be closed: {error}")
        os._exit(1)
    zygote.tell(hardened=protections)
    zygote.load(order)
    if zygote.threads() > 1:
        zygote.serve_alone()
    zygote.serve()
