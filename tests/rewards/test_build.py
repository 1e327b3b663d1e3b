"""Sandboxes of each tier, looked at from inside: what is there, what is not, and what Python can still do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from boxes import LIMITS, as_nobody, here, needs, visit

from rewardsmith.errors import SandboxError
from rewardsmith.rewards.sandbox import build
from rewardsmith.rewards.sandbox.tiers import Tier
from rewardsmith.wire import JOB_MARKER

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are in Linux only")
BOXED = [Tier.S2, Tier.S3]
CONFINED = [Tier.S1, *BOXED]
is_root = os.geteuid() == 0


@pytest.mark.parametrize("tier", CONFINED)
def test_packages_are_read_and_not_written(tier: Tier, tmp_path: Path) -> None:
    needs(tier)
    package = tmp_path / "packages" / "gift"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("VALUE = 7")
    program = """
    sys.path.append(given["folder"])
    import gift
    found["value"] = gift.VALUE
    attempt("write", lambda: Path(given["folder"], "gift", "__init__.py").write_text("VALUE = 8"))
    attempt("add", lambda: Path(given["folder"], "evil.pth").write_text("import evil"))
    attempt("mode", lambda: os.chmod(given["folder"], 0o777))
    """
    seen = visit(tier, program, site_dirs=[package.parent], folder=package.parent).found
    assert seen["value"] == 7
    assert {seen["write"], seen["add"], seen["mode"]} <= {"EROFS", "EACCES", "EPERM"}
    assert (package / "__init__.py").read_text() == "VALUE = 7"
    assert [file.name for file in package.parent.iterdir()] == ["gift"]


@pytest.mark.parametrize("tier", CONFINED)
def test_the_interpreter_and_the_harness_are_not_written(tier: Tier) -> None:
    needs(tier)
    program = """
    for name, folder in {"harness": harden.__file__, "library": os.__file__, "python": sys.executable}.items():
        attempt(name, lambda: Path(folder).with_name("planted").write_text("x"))
        attempt(f"{name} itself", lambda: open(folder, "r+b").close())
    """
    seen = visit(tier, program).found
    refused = {value for name, value in seen.items() if name != "hardened"}
    assert refused <= {"EROFS", "EACCES", "EPERM", "ETXTBSY"}


@pytest.mark.parametrize("tier", BOXED)
def test_the_file_system_of_a_box(tier: Tier) -> None:
    needs(tier)
    program = """
    found["root"] = sorted(os.listdir("/"))
    found["etc"] = sorted(os.listdir("/etc"))
    found["home"] = [os.environ["HOME"], os.environ["TMPDIR"], os.getcwd()]
    found["processes"] = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    import pwd
    found["user"] = [pwd.getpwuid(os.getuid()).pw_name, len(pwd.getpwall())]
    found["host"] = socket.gethostname()
    found["mounted read-only"] = [path for path in given["sealed"] if os.statvfs(path).f_flag & os.ST_RDONLY]
    for path in ("/", "/etc", "/dev", "/harness", "/usr"):
        attempt(f"write {path}", lambda: Path(path, "planted").write_text("x"))
    for path in ("/tmp", "/dev/shm"):
        attempt(f"write {path}", lambda: Path(path, "planted").write_text("x"))
        found[f"size {path}"] = os.statvfs(path).f_blocks * os.statvfs(path).f_frsize
    """
    sealed = ["/", "/dev", "/usr", "/harness/inside", "/etc/passwd"]
    seen = visit(tier, program, sealed=sealed).found
    assert seen["mounted read-only"] == sealed, "by the mounts too, not by Landlock and the user alone"
    assert set(seen["root"]) >= {"dev", "etc", "harness", "proc", "tmp", "usr"}
    assert not {"home", "var", "srv", "opt", "sys", "run", "mnt"} & set(seen["root"])
    made = {"passwd", "group", "hosts", "nsswitch.conf"}
    assert made <= set(seen["etc"]) <= made | {"alternatives", "ld.so.cache", "localtime", "ssl"}
    assert seen["home"] == ["/tmp"] * 3
    assert max(seen["processes"]) < 10
    assert seen["user"] == ["reward", 1] and seen["host"] == "sandbox"
    for path in ("/", "/etc", "/dev", "/harness", "/usr"):
        assert seen[f"write {path}"] in ("EROFS", "EACCES"), path
    assert seen["write /tmp"] == seen["write /dev/shm"] == "done"
    assert (seen["size /tmp"], seen["size /dev/shm"]) == (LIMITS.tmp_bytes, LIMITS.shm_bytes)


@pytest.mark.parametrize("tier", CONFINED)
def test_only_its_own_descriptors_and_environment(tier: Tier) -> None:
    needs(tier)
    planted = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(planted, True)
    try:
        program = """
        def is_open(fd):
            try:
                os.fstat(fd)
            except OSError:
                return False
            return True
        found["open"] = [fd for fd in range(256) if is_open(fd)]
        found["environment"] = dict(os.environ)
        """
        os.environ["REWARDSMITH_API_TOKEN"] = "must not travel"
        marker = {JOB_MARKER: "job:1", "OPENAI_KEY": "a secret", "LD_PRELOAD": "/tmp/evil.so"}
        visited = visit(tier, program, environment=marker)
    finally:
        os.close(planted)
        del os.environ["REWARDSMITH_API_TOKEN"]
    seen = visited.found
    assert len(seen["open"]) == 4, "0, 1, 2 and the channel to the supervisor"
    assert planted not in seen["open"] or planted == seen["open"][3]
    names = set(seen["environment"]) - {"PWD", "SHLVL", "OLDPWD", "_", "LC_CTYPE"}  # the shell's
    assert names == set(build.ENVIRONMENT) | {"HOME", "TMPDIR"} | set(marker)
    assert seen["environment"]["OPENAI_KEY"] == "a secret"
    written = json.dumps([visited.launch.argv, visited.launch.env])
    assert "a secret" not in written and "evil.so" not in written
    assert visited.launch.env[JOB_MARKER] == "job:1"
    assert "evil.so" not in visited.errors, "it was not there while the process started"


@pytest.mark.parametrize("tier", CONFINED)
def test_limits_hold_and_are_told_apart(tier: Tier) -> None:
    needs(tier)
    program = """
    def fill(path, size):
        with open(path, "wb") as file:
            file.write(bytes(size))
    big = os.path.join(os.environ["TMPDIR"], "big")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    attempt("one file", lambda: fill(big, 2 * given["file"]))
    os.unlink(big)
    attempt("descriptors", lambda: [open("/dev/null") for _ in range(1000)])
    try:
        bytearray(2 * given["memory"])
    except MemoryError:
        found["memory"] = "MemoryError"
    """
    seen = visit(tier, program, file=LIMITS.file_bytes, memory=LIMITS.memory_bytes).found
    assert (seen["one file"], seen["descriptors"], seen["memory"]) == ("EFBIG", "EMFILE", "MemoryError")


def test_memory_of_all_together_is_bounded_in_s3() -> None:
    needs(Tier.S3)
    program = """
    import time
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            held = b"x" * (48 * 2**20)
            time.sleep(0.5)
            os._exit(0)
        children.append(child)
    found["ended by"] = [os.WTERMSIG(os.waitpid(child, 0)[1]) for child in children]
    """
    visited = visit(Tier.S3, program)
    assert 9 in visited.found["ended by"]
    assert visited.memory_kills == visited.found["ended by"].count(9)


@pytest.mark.parametrize("tier", BOXED)
def test_what_python_needs_works(tier: Tier) -> None:
    needs(tier)
    program = """
    import asyncio, concurrent.futures, ctypes, multiprocessing, sqlite3, ssl, subprocess, tempfile, threading
    from multiprocessing import shared_memory
    async def coroutine():
        await asyncio.sleep(0)
        return 1
    found["asyncio"] = asyncio.run(coroutine())
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "file").write_text("x")
        found["tempfile"] = os.listdir(folder)
    asked = subprocess.run([sys.executable, "-c", "print(2)"], capture_output=True, text=True, start_new_session=True)
    found["subprocess"] = asked.stdout + asked.stderr
    with multiprocessing.Pool(2) as pool:
        found["pool"] = pool.map(abs, [-3, 4])
    block = shared_memory.SharedMemory(create=True, size=4096)
    block.buf[0] = 5
    found["shared"] = block.buf[0]
    block.close()
    block.unlink()
    signal.signal(signal.SIGALRM, lambda *_: found.update(alarm=True))
    signal.alarm(1)
    signal.pause()
    with sqlite3.connect(":memory:") as database:
        found["sqlite"] = database.execute("select 6").fetchone()[0]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        found["threads"] = list(threads.map(abs, [-7]))
    left, right = socket.socketpair()
    left.send(b"8")
    found["socketpair"] = right.recv(1).decode()
    found["callback"] = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 9)()
    """
    seen = visit(tier, program).found
    del seen["hardened"]
    assert seen == {
        "asyncio": 1,
        "tempfile": ["file"],
        "subprocess": "2\n",
        "pool": [3, 4],
        "shared": 5,
        "alarm": True,
        "sqlite": 6,
        "threads": [7],
        "socketpair": "8",
        "callback": 9,
    }


def test_without_a_proc_python_runs_too() -> None:
    needs(Tier.S2)
    program = """
    import subprocess
    attempt("proc", lambda: os.listdir("/proc"))
    found["out"] = subprocess.getoutput("id")
    """
    seen = visit(Tier.S2, program, proc=False).found
    assert seen["proc"] == "ENOENT" and "reward" in seen["out"]


@pytest.mark.skipif(not is_root, reason="only root can become another user")
def test_each_sandbox_of_a_root_server_has_a_user_of_its_own() -> None:
    needs(Tier.S2)
    uids = []

    def start() -> build.Launch:
        return build.launch(Tier.S2, LIMITS, control_fd=1, order_fd=0, site_dirs=[], environment={}, scratch=None)

    launches = [start() for _ in range(3)]
    try:
        uids = [launch.plan["uid"] for launch in launches]
        assert len(set(uids)) == 3 and min(uids) >= 65_000
        launches[0].close()
        launches.append(start())
        assert launches[-1].plan["uid"] == uids[0], "it was given back"
    finally:
        for launch in launches:
            launch.close()


@pytest.mark.skipif(not is_root, reason="root can reach what others cannot")
def test_packages_that_only_root_can_reach_are_readable_in_a_box() -> None:
    needs(Tier.S2)
    folder = Path(os.environ.get("TMPDIR", "/tmp"), f"rewardsmith-test-{os.getpid()}")
    (folder / "deep" / "packages").mkdir(parents=True)
    try:
        (folder / "deep" / "packages" / "gift.py").write_text("VALUE = 7")
        folder.chmod(0o700)
        program = """
        sys.path.append(given["folder"])
        import gift
        found |= {"value": gift.VALUE, "uid": os.getuid()}
        """
        seen = visit(Tier.S2, program, site_dirs=[folder / "deep" / "packages"], folder=folder / "deep/packages").found
        assert seen["value"] == 7 and seen["uid"] >= 65_000
    finally:
        shutil.rmtree(folder)


def test_s1_writes_to_its_scratch_folder_only(tmp_path: Path) -> None:
    needs(Tier.S1)
    program = """
    found["home"] = [os.environ["HOME"], os.environ["TMPDIR"], os.getcwd()]
    attempt("own", lambda: Path("file").write_text("x"))
    attempt("tmp", lambda: Path("/tmp/planted").write_text("x"))
    attempt("shm", lambda: Path("/dev/shm/planted").write_text("x"))
    attempt("proc", lambda: os.listdir("/proc"))
    attempt("home folder", lambda: os.listdir("/home"))
    attempt("passwd", lambda: open("/etc/passwd").close())
    attempt("socket", lambda: socket.socket().close())
    attempt("group", lambda: os.setpgid(0, 0))
    found["uid"] = os.getuid()
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    visited = visit(Tier.S1, program, scratch=scratch)
    seen = visited.found
    assert seen["home"] == [str(scratch)] * 3
    assert seen["own"] == "done" and (scratch / "file").read_text() == "x"
    assert {seen[name] for name in ("tmp", "shm", "proc", "home folder", "passwd")} == {"EACCES"}
    assert seen["socket"] == seen["group"] == "EPERM"
    (scratch / "file").unlink()


def test_s0_is_bounded_and_nothing_else(tmp_path: Path) -> None:
    seen = visit(Tier.S0, "found['uid'] = os.getuid(); attempt('read', lambda: open('/etc/passwd').close())").found
    assert seen["hardened"] == ["ends with its supervisor", "resource limits"]
    assert (seen["uid"], seen["read"]) == (os.getuid(), "done")


def test_bubblewrap_that_is_missing_or_setuid_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> None:
        build.launch(Tier.S2, LIMITS, control_fd=1, order_fd=0, site_dirs=[], environment={}, scratch=None).close()

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="bubblewrap is not installed"):
        start()
    (tmp_path / "bwrap").write_text("#!/bin/sh\n")
    (tmp_path / "bwrap").chmod(0o4755)
    with pytest.raises(SandboxError, match="is setuid"):
        start()


USER_MODE = """
import json, sys
sys.path.insert(0, "TESTS")
from boxes import visit
from rewardsmith.rewards.sandbox.tiers import Tier
visited = visit(Tier.S2, '''
found |= {"uid": os.getuid(), "groups": os.getgroups(), "processes": len(os.listdir("/proc"))}
attempt("write", lambda: Path("/tmp/file").write_text("x"))
attempt("root", lambda: os.setuid(0))
forks = []
try:
    while len(forks) < 100:
        child = os.fork()
        if not child:
            signal.pause()
        forks.append(child)
except BlockingIOError:
    pass
for child in forks:
    os.kill(child, 9)
found["forks"] = len(forks)
''')
print(json.dumps(visited.found))
"""


def test_a_user_without_rights_gets_a_box_too() -> None:
    if here() < Tier.S2:
        pytest.skip("no boxes here")
    done = as_nobody(USER_MODE.replace("TESTS", str(Path(__file__).parent)))
    if "namespace" in done.stderr:
        pytest.skip("this machine does not let users make namespaces")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["uid"], seen["write"]) == (build.INNER_UID, "done")
    assert seen["root"] in ("EPERM", "EINVAL"), "there is no root in its user namespace"
    assert 30 < seen["forks"] < LIMITS.processes, "only its own processes count"


def test_a_scratch_folder_is_demanded_where_there_is_no_private_one() -> None:
    with pytest.raises(ValueError, match="tier S1 needs a scratch folder"):
        build.launch(Tier.S1, LIMITS, control_fd=1, order_fd=0, site_dirs=[], environment={}, scratch=None)


def test_nothing_runs_when_the_group_cannot_be_joined(tmp_path: Path) -> None:
    needs(Tier.S3)
    launch = build.launch(Tier.S3, LIMITS, control_fd=1, order_fd=0, site_dirs=[], environment={}, scratch=None)
    assert launch.cgroup is not None
    launch.cgroup.remove()
    try:
        done = subprocess.run(launch.argv, env=launch.env, pass_fds=launch.pass_fds, capture_output=True, text=True)
    finally:
        launch.close()
    assert done.returncode == 126 and "cgroup" in done.stderr
