"""Which tier this machine can give: a real sandbox is started, attacked from inside, and what it stopped is the answer.

The ladder goes down from S3 until a sandbox starts and stops all that its tier must stop. `build` makes the sandboxes,
`bait` the targets, `tiers` has the rules. The answer is kept for this process, and in the user's cache for the next,
until something changes that it depends on. A kept answer that is wrong cannot do harm: a tier that is asked for is
built whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

from rewardsmith.errors import SandboxError
from rewardsmith.rewards.sandbox import build, tiers
from rewardsmith.rewards.sandbox.advice import explain
from rewardsmith.rewards.sandbox.bait import Bait
from rewardsmith.rewards.sandbox.limits import Limits
from rewardsmith.rewards.sandbox.tiers import Tier, Trial
from rewardsmith.wire import Obstacle, SandboxReport

# Small, so that reaching each of them takes no time.
LIMITS = Limits(
    memory_bytes=2**30,
    sandbox_bytes=64 * 2**20,
    file_bytes=2**20,
    tmp_bytes=2 * 2**20,
    shm_bytes=2**20,
    processes=32,
)
TARGETED_LIMITS = ("memory_bytes", "sandbox_bytes", "file_bytes", "tmp_bytes", "processes")
# (tier, with a /proc of its own), the best first.
LADDER = (
    *((tier, proc) for tier in (Tier.S3, Tier.S2) for proc in (True, False)),
    *((tier, True) for tier in (Tier.S1, Tier.S1w, Tier.S0)),
)
END = b'{"done": true}\n'  # the last word of `inside.trial`
SECONDS = 20.0  # that all attacks may take on a machine that does other things too
SECONDS_TO_END = 5.0

_turns = threading.Lock()
_known: dict[str, SandboxReport] = {}


def report(fresh: bool = False) -> SandboxReport:
    """What the sandbox of this machine stops. Takes up to a second the first time, or when `fresh`."""
    with _turns:
        key = _surroundings()
        found = None if fresh else _known.get(key) or _remembered(key)
        if found is None:
            found = _climb()
            if all(obstacle.remedy for obstacle in found.obstacles):  # another is a surprise, to be looked at again
                _remember(key, found)
        _known[key] = found
        return found


def required(minimum: Tier, unsafe: bool) -> Tier:
    """The tier to run user code in. Raises SandboxError with reasons and remedies below `minimum`, unless `unsafe`."""
    found = report()
    if Tier[found.tier] < minimum:
        found = report(fresh=True)  # something may have been put right since
    return tiers.admit(found, minimum, unsafe)


# ---- the ladder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attempt:
    """One sandbox and how the attacks on it went."""

    trials: dict[str, Trial]
    hardened: list[str]
    processes_shared: bool


def _climb() -> SandboxReport:
    started = time.monotonic()
    obstacles: list[Obstacle] = []
    for tier, proc in LADDER:
        try:
            attempt = _attack(tier, proc)
            gap = tiers.gap(tier, attempt.trials)
            if gap is None:
                break
            reason, remedy = f"in a sandbox of this tier, {gap}", ""
        except (SandboxError, OSError) as error:
            reason, remedy = explain(str(error))
        if reason not in {obstacle.reason for obstacle in obstacles}:
            obstacles.append(Obstacle(tier=tier.wire_name, reason=reason, remedy=remedy))
    else:
        raise SandboxError(f"not even an unprotected process can be started: {reason}")
    made_of, not_stopped = tiers.MEANING[tier]
    return SandboxReport(
        tier=tier.wire_name,
        made_of=made_of,
        not_stopped=not_stopped,
        protections=tiers.protections(attempt.trials, obstacles, processes_shared=attempt.processes_shared),
        obstacles=obstacles,
        hardened=attempt.hardened,
        proc=proc,
        user="root" if os.geteuid() == 0 else f"user id {os.geteuid()}",
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        bubblewrap=_bubblewrap_version(),
        version=version("rewardsmith"),
        seconds=round(time.monotonic() - started, 3),
    )


def _attack(tier: Tier, proc: bool) -> _Attempt:
    """Start one sandbox and have it attacked. Raises SandboxError with what it said when it does not start."""
    if sys.platform != "linux":
        untried = Trial(False, "not tried: what stops it is in Linux only")
        return _Attempt({attack: untried for attack in tiers.ATTACKS}, [], False)
    with ExitStack() as held:
        bait = held.enter_context(Bait())
        errors = held.enter_context(tempfile.TemporaryFile())
        control, control_end = map(held.enter_context, _pipe())
        order_end, order = map(held.enter_context, _pipe())
        scratch = Path(tempfile.mkdtemp(prefix="rewardsmith-probe-"))
        held.callback(shutil.rmtree, scratch, ignore_errors=True)
        launch = build.launch(
            tier,
            LIMITS,
            control_fd=control_end.fileno(),
            order_fd=order_end.fileno(),
            site_dirs=[],
            environment={},
            scratch=scratch,
            program="trial",
            proc=proc,
        )
        held.callback(launch.close)
        process = subprocess.Popen(
            launch.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=launch.env,
            cwd=launch.cwd,
            pass_fds=launch.pass_fds,
            start_new_session=True,
        )
        control_end.close()
        order_end.close()
        try:
            targets = bait.targets | {name: getattr(LIMITS, name) for name in TARGETED_LIMITS}
            targets["namespaces"] = launch.plan["namespaces"]
            with suppress(BrokenPipeError):  # it has ended: its last words say why
                order.write(json.dumps({"plan": launch.plan, "targets": targets}).encode())
            order.close()
            said = _listen(control)
        finally:
            _end(process)
        launch.close()
        errors.seek(0)
        trials, hardened = _understood(said, errors)
        if not _is_closed(control):
            trials["leave_a_process_behind"] = Trial(False, "still running after the sandbox")
        for attack in bait.touched():
            trials[attack] = Trial(False, "seen from outside")
        shared = launch.plan["shared_user"] and launch.cgroup is None
    return _Attempt(trials, hardened, shared)


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    read_end, write_end = os.pipe()
    return os.fdopen(read_end, "rb", 0), os.fdopen(write_end, "wb", 0)


def _listen(control: IO[bytes]) -> bytes:
    """All that is said until the end, or until the time is up."""
    said = b""
    give_up = time.monotonic() + SECONDS
    while not said.endswith(END) and (left := give_up - time.monotonic()) > 0:
        if select.select([control], [], [], left)[0]:
            data = control.read(65536)
            if not data:
                break
            said += data
    return said


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group while its number is still its own."""
    give_up = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < give_up and not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _understood(said: bytes, errors: IO[bytes]) -> tuple[dict[str, Trial], list[str]]:
    trials: dict[str, Trial] = {}
    hardened: list[str] = []
    for line in said.splitlines():
        message = json.loads(line)
        hardened = message.get("hardened", hardened)
        if "attack" in message:
            trials[message["attack"]] = Trial(message["stopped"], message["evidence"])
    if not said.endswith(END):
        raise SandboxError(errors.read(4096).decode(errors="replace").strip() or "it ended without a word")
    return trials, hardened


def _is_closed(control: IO[bytes]) -> bool:
    """Whether every process that could write to it has ended."""
    ready = select.select([control], [], [], SECONDS_TO_END)[0]
    return bool(ready) and not control.read(1)


# ---- what was found before ------------------------------------------------------------------------------------------


def _surroundings() -> str:
    """All that the answer depends on, so that it is asked for again when one of these has changed."""
    parts = [platform.platform(), sys.version, build.interpreter(), os.geteuid()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts += [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "pid", "user")]
        status = Path("/proc/self/status").read_text().splitlines()
        parts += [line for line in status if line.startswith(("CapEff", "NoNewPrivs", "Seccomp:"))]
    if bubblewrap := shutil.which("bwrap"):
        about = os.stat(bubblewrap)
        parts += [bubblewrap, about.st_mtime_ns, about.st_size, about.st_mode]
    own = sorted([*build.INSIDE.glob("*.py"), *Path(__file__).parent.glob("*.py")])
    parts += [hashlib.sha256(b"".join(file.read_bytes() for file in own)).hexdigest()]
    return "\n".join(map(str, parts))


def _cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "rewardsmith", "sandbox.json")


def _remembered(key: str) -> SandboxReport | None:
    """From a file that nobody else can have written."""
    with suppress(OSError, ValueError, KeyError):
        fd = os.open(_cache_file(), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            about = os.fstat(fd)
            kept = json.load(file)
        if about.st_uid == os.geteuid() and not about.st_mode & 0o022 and kept["key"] == key:
            return SandboxReport.model_validate(kept["report"])
    return None


def _remember(key: str, found: SandboxReport) -> None:
    file = _cache_file()
    with suppress(OSError):  # kept only to save time
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(fd, "w") as draft:
            json.dump({"key": key, "report": found.model_dump(mode="json")}, draft)
        os.replace(name, file)


def _bubblewrap_version() -> str | None:
    command = shutil.which("bwrap")
    if command is None:
        return None
    asked = subprocess.run([command, "--version"], capture_output=True, text=True)
    return asked.stdout.strip().removeprefix("bubblewrap ") or None
