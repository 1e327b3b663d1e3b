"""Sandboxes of each tier for tests: any program run inside one, and what it found there as JSON.

The program runs after hardening, as user code would. It has `found`, a dict to fill, `given`, the data of the test,
and `attempt(name, action)`, which notes "done" or the name of the error.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from rewardsmith.rewards.sandbox import build, probe
from rewardsmith.rewards.sandbox.limits import Limits
from rewardsmith.rewards.sandbox.tiers import Tier

LIMITS = Limits(
    memory_bytes=2**30, sandbox_bytes=128 * 2**20, tmp_bytes=4 * 2**20, shm_bytes=2 * 2**20, file_bytes=2**20
)

PROGRAM = '''
"""Runs what it is told to, hardened."""
import errno, json, os, resource, signal, socket, sys
from pathlib import Path
from . import harden

def main():
    control, order = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(order) as file:
        asked = json.load(file)
    found = {"hardened": harden.harden(asked["plan"])}

    def attempt(name, action):
        try:
            action()
            found[name] = "done"
        except OSError as error:
            found[name] = errno.errorcode.get(error.errno, str(error))

    exec(asked["program"], {**globals(), "found": found, "given": asked["given"], "attempt": attempt})
    os.write(control, json.dumps(found).encode())
'''


@dataclass(frozen=True)
class Visit:
    """`launch` as it was used, what the program found, what came on stderr and how it ended."""

    launch: build.Launch
    found: dict[str, Any]
    errors: str
    code: int
    memory_kills: int


def visit(
    tier: Tier,
    program: str = "",
    *,
    limits: Limits = LIMITS,
    site_dirs: Sequence[Path] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
    proc: bool = True,
    scratch: Path | None = None,
    **given: Any,
) -> Visit:
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryFile() as log,
    ):
        inside = Path(folder, "inside")
        shutil.copytree(build.INSIDE, inside, ignore=shutil.ignore_patterns("__pycache__"))
        (inside / "visit.py").write_text(PROGRAM)
        patch.setattr(build, "INSIDE", inside)
        control, control_end = os.pipe()
        order_end, order = os.pipe()
        own_scratch = Path(tempfile.mkdtemp())
        launch = build.launch(
            tier,
            limits,
            control_fd=control_end,
            order_fd=order_end,
            site_dirs=site_dirs,
            environment=environment,
            scratch=scratch or own_scratch,
            program="visit",
            proc=proc,
        )
        try:
            process = subprocess.Popen(
                launch.argv,
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=launch.env,
                cwd=launch.cwd,
                pass_fds=launch.pass_fds,
                start_new_session=True,
            )
            os.close(control_end)
            os.close(order_end)
            asked = {"plan": launch.plan, "program": textwrap.dedent(program), "given": given}
            with os.fdopen(order, "wb", 0) as file:
                file.write(json.dumps(asked, default=str).encode())
            code = process.wait(30)
            kills = launch.memory_kills()
            with os.fdopen(control, "rb") as file:
                said = file.read()
        finally:
            launch.close()
            shutil.rmtree(own_scratch)
        log.seek(0)
        errors = log.read().decode()
        assert said, f"nothing came back: {errors}"
        return Visit(launch, json.loads(said), errors, code, kills)


def here() -> Tier:
    """What this machine can give to this user."""
    return Tier[probe.report().tier]


def needs(tier: Tier) -> None:
    if here() < tier:
        pytest.skip(f"this machine has tier {here()}")


def python_for_all() -> str:
    """A Python of the same version that every user may run; the test is skipped without one."""
    for path in (Path(sys.base_prefix, "bin"), Path("/usr/bin"), Path("/usr/local/bin")):
        python = path / f"python{sys.version_info.major}.{sys.version_info.minor}"
        if python.exists() and all(folder.stat().st_mode & 0o001 for folder in python.resolve().parents):
            return str(python)
    pytest.skip("there is no Python that other users may run")


def as_nobody(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program that imports rewardsmith as a user without any rights; needs root."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user")
    source, packages = Path(build.__file__).parents[3], Path(pytest.__file__).parents[1]
    if not all(folder.stat().st_mode & 0o001 for part in (source, packages) for folder in [part, *part.parents]):
        pytest.skip("other users cannot read the source")
    return subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python_for_all(), "-c", program],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{source}:{packages}", "HOME": "/nonexistent", **variables},
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
