"""Landlock in the kernel: what a confined process still reaches. Everything is tried in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from rewardsmith.rewards.inside import landlock
from rewardsmith.rewards.sandbox.build import INSIDE

pytestmark = pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock")
needs_scopes = pytest.mark.skipif(landlock.abi() < 6, reason="Landlock before ABI 6 knows neither signals nor sockets")

BEGIN = """
import errno, json, os, signal, socket, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from inside import harden, kernel, landlock
found, given = {}, json.loads(sys.argv[2])
def attempt(name, what):
    try:
        what()
        found[name] = "done"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
"""


def tried(program: str, **given: Any) -> dict[str, str]:
    """What each attempt of the program came to. `given` are its data."""
    code = f"{BEGIN}{textwrap.dedent(program)}\nprint(json.dumps(found))"
    command = [sys.executable, "-c", code, str(INSIDE.parent), json.dumps(given, default=str)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_files_below_the_given_paths_and_no_others(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("read", "write", "other")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "file").write_text("text")
    program = """
    kernel.prctl(kernel.SET_NO_NEW_PRIVS, 1)
    landlock.restrict([given["read"], "/usr"], [given["write"], "/dev/null"])
    for name in ("read", "write", "other"):
        folder = Path(given[name])
        attempt(f"{name}: list", lambda: os.listdir(folder))
        attempt(f"{name}: read", lambda: (folder / "file").read_text())
        attempt(f"{name}: make", lambda: (folder / "new").write_text("x"))
        attempt(f"{name}: cut", lambda: os.truncate(folder / "file", 0))
        attempt(f"{name}: remove", lambda: (folder / "file").unlink())
    attempt("device", lambda: os.mknod(Path(given["write"], "node"), 0o60600, os.makedev(1, 3)))
    attempt("null", lambda: open("/dev/null", "w").close())
    attempt("link out", lambda: os.link(Path(given["write"], "new"), Path(given["other"], "link")))
    """
    found = tried(program, **folders)
    everything = ("list", "read", "make", "cut", "remove")
    truncated = "done" if landlock.abi() < 3 else "EACCES"  # older ones do not know that right
    assert {name: found[f"other: {name}"] for name in everything} == {
        **dict.fromkeys(everything, "EACCES"),
        "cut": truncated,
    }
    assert {name: found[f"read: {name}"] for name in everything} == {
        **{"list": "done", "read": "done", "make": "EACCES", "remove": "EACCES"},
        "cut": truncated,
    }
    assert {name: found[f"write: {name}"] for name in everything} == dict.fromkeys(everything, "done")
    assert (found["device"], found["null"]) == ("EACCES", "done") or os.getuid() != 0
    assert found["link out"] in ("EACCES", "EXDEV")
    assert sorted(file.name for file in folders["other"].iterdir()) == ["file"]


@pytest.mark.skipif(landlock.abi() < 4, reason="Landlock before ABI 4 knows no network")
def test_no_tcp(tmp_path: Path) -> None:
    program = """
    kernel.prctl(kernel.SET_NO_NEW_PRIVS, 1)
    landlock.restrict(["/"], ["/"])
    attempt("connect", lambda: socket.create_connection(("127.0.0.1", given["port"])).close())
    attempt("listen", lambda: socket.create_server(("127.0.0.1", 0)).close())
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert tried(program, port=listener.getsockname()[1]) == {"connect": "EACCES", "listen": "EACCES"}


@needs_scopes
def test_neither_signals_nor_abstract_sockets_reach_outside() -> None:
    program = """
    kernel.prctl(kernel.SET_NO_NEW_PRIVS, 1)
    landlock.restrict(["/"], ["/"])
    attempt("signal", lambda: os.kill(given["victim"], signal.SIGKILL))
    child = os.fork()
    if not child:
        signal.pause()
    attempt("own child", lambda: (os.kill(child, signal.SIGKILL), os.waitpid(child, 0)))
    client = socket.socket(socket.AF_UNIX)
    attempt("abstract", lambda: client.connect("\\0" + given["name"]))
    """
    victim = subprocess.Popen(["sleep", "60"])
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            name = f"rewardsmith-test-{os.getpid()}"
            listener.bind(f"\0{name}")
            listener.listen()
            found = tried(program, victim=victim.pid, name=name)
        assert found == {"signal": "EPERM", "own child": "done", "abstract": "EPERM"}
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@needs_scopes
def test_an_enclosed_child_reaches_less_than_its_parent_and_each_of_a_chain_less_again(tmp_path: Path) -> None:
    program = """
    read_end, write_end = os.pipe()
    parent = os.getpid()
    kernel.drop_capabilities()  # as in a sandbox; some of root's would open /proc all the same
    if not os.fork():
        assert harden.enclose(["/"], [given["folder"]])
        attempt("parent", lambda: os.kill(parent, signal.SIGKILL))
        attempt("memory", lambda: open(f"/proc/{parent}/mem", "rb").close())
        attempt("environ", lambda: open(f"/proc/{parent}/environ", "rb").close())
        attempt("write", lambda: Path(given["folder"], "one").write_text("x"))
        middle = os.getpid()
        if not os.fork():
            assert harden.enclose(["/"], [])
            attempt("grandparent", lambda: os.kill(middle, signal.SIGKILL))
            attempt("write again", lambda: Path(given["folder"], "two").write_text("x"))
            os.write(write_end, json.dumps(found).encode())
            os._exit(0)
        os.wait()
        os._exit(0)
    os.wait()
    found = json.loads(os.read(read_end, 65536))
    """
    assert tried(program, folder=tmp_path) == {
        "parent": "EPERM",
        "memory": "EACCES",
        "environ": "EACCES",
        "write": "done",
        "grandparent": "EPERM",
        "write again": "EACCES",
    }


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    program = """
    kernel.prctl(kernel.SET_NO_NEW_PRIVS, 1)
    attempt("restrict", lambda: landlock.restrict([given["path"]], []))
    attempt("still free", lambda: os.listdir("/"))
    """
    assert tried(program, path=tmp_path / "none") == {"restrict": "ENOENT", "still free": "done"}


def test_signals_among_the_confined_still_arrive() -> None:
    """An executor may be told to print its stack."""
    program = """
    kernel.prctl(kernel.SET_NO_NEW_PRIVS, 1)
    landlock.restrict(["/"], ["/"])
    child = os.fork()
    if not child:
        harden.enclose(["/"], ["/"])
        signal.pause()
    attempt("down", lambda: os.kill(child, signal.SIGUSR2))
    _, status = os.waitpid(child, 0)
    found["ended by"] = str(os.WTERMSIG(status))
    """
    assert tried(program) == {"down": "done", "ended by": str(signal.SIGUSR2.value)}
