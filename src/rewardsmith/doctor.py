"""What this machine has for training, and what is missing: `rewardsmith doctor`.

Every finding is looked at, not assumed: torch is imported in a process of its own, the server is asked, the home
folder is tried, a sandbox is attacked (or its last answer read from the cache). Nothing is installed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from rewardsmith import catalog
from rewardsmith.client import Rewardsmith
from rewardsmith.errors import ConfigError, RewardsmithError
from rewardsmith.home import default_base_url, default_home, token_file
from rewardsmith.rewards.sandbox import probe
from rewardsmith.rewards.sandbox.tiers import Tier

GIB = 2**30
STYLES = {"ok": "green", "note": "yellow", "bad": "bold red"}
INSTALL_SERVER = 'pip install "rewardsmith[server]", or pip install ".[server]" in a clone'

_ASK_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}))
"""


@dataclass(frozen=True)
class Finding:
    """`note`: something is absent that training can do without. `bad`: training cannot run."""

    name: str
    state: Literal["ok", "note", "bad"]
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    version: str
    can_train: bool
    findings: list[Finding]


def examine() -> Report:
    torch, found = _torch()
    findings = [
        _python(),
        _cores(),
        _memory(),
        _packages(),
        torch,
        _gpu(found),
        _model(),
        _isolation(),
        _home(),
        _server(),
        Finding("system", "ok", "no system packages are needed"),
    ]
    return Report(metadata.version("rewardsmith"), all(f.state != "bad" for f in findings), findings)


def show(report: Report, console: Console | None = None) -> None:
    out = console or Console(highlight=False)
    width = max(len(finding.name) for finding in report.findings)
    out.print(Text(f"Rewardsmith {report.version} on this machine\n", "bold"))
    for finding in report.findings:
        head = (f"  {finding.state:<4}  ", STYLES[finding.state])
        out.print(Text.assemble(head, f"{finding.name:<{width}}  {finding.text}"), soft_wrap=True)
        if finding.advice:
            out.print(Text(f"{' ' * (width + 10)}{finding.advice}", "dim"), soft_wrap=True)
    verdict = "Training can run here." if report.can_train else "Training cannot run here: see `bad` above."
    out.print(Text(f"\n{verdict}", STYLES["ok" if report.can_train else "bad"]))


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    if sys.platform != "linux":
        return Finding("python", "note", text, "Limits on reward processes are complete on Linux only.")
    return Finding("python", "ok", text)


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        allowed = int(quota[0]) / int(quota[1])
        if allowed < cores:
            return Finding("cores", "ok", f"{cores}, of which this container may use {allowed:g} at a time")
    return Finding("cores", "ok", str(cores))


def _memory() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup("memory.max").strip()
    if limit.isdigit():
        memory = min(memory, int(limit))
    text = f"{memory / GIB:.1f} GiB"
    if memory < 4 * GIB:
        return Finding("memory", "note", text, "Enough for the built-in model and little else.")
    return Finding("memory", "ok", text)


def _packages() -> Finding:
    """Versions against what this package asks for, the server's extra included."""
    advice = f"Install the server part, which training needs: {INSTALL_SERVER}"
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return Finding("packages", "bad", "the server part is not installed (packaging is missing)", advice)
    missing, wrong = [], []
    for requirement in map(Requirement, metadata.requires("rewardsmith") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": "server"}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if missing:
        wrong.append(f"missing: {', '.join(missing)}")
    if wrong:
        return Finding("packages", "bad", "; ".join(wrong), advice)
    return Finding("packages", "ok", "all that training needs, in versions that fit")


def _torch() -> tuple[Finding, dict[str, Any]]:
    """Imported in another process: a broken installation may take its process with it."""
    asked = subprocess.run(
        [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or [f"its process ended with {asked.returncode}"])[-1]
        absent = reason == "ModuleNotFoundError: No module named 'torch'"
        return Finding("torch", "bad", "not installed" if absent else f"cannot be imported: {reason}"), {}
    found = json.loads(asked.stdout)
    build = f"built for CUDA {found['cuda']}" if found["cuda"] else "built for CPUs"
    return Finding("torch", "ok", f"{found['version']}, {build}"), found


def _gpu(torch: dict[str, Any]) -> Finding:
    if torch.get("gpus"):
        return Finding("gpu", "ok", ", ".join(torch["gpus"]))
    if shutil.which("nvidia-smi") is None:
        return Finding("gpu", "note", "none found", "Training runs on the CPU, which suits small models.")
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True, text=True
    )
    if asked.returncode:
        return Finding("gpu", "note", "nvidia-smi fails, so the driver does not work", "Training runs on the CPU.")
    names = "; ".join(asked.stdout.split("\n")).strip("; ")
    advice = "Training runs on the CPU. Install a torch that is built for CUDA: https://pytorch.org/get-started"
    return Finding("gpu", "note", f"{names}, but torch cannot use it", advice)


def _model() -> Finding:
    if (catalog.EMBEDDED / "config.json").is_file():
        return Finding("model", "ok", "countdown-tiny is built in; others come from Hugging Face or a local folder")
    return Finding("model", "note", f"the built-in model is not in {catalog.EMBEDDED}", "`rewardsmith demo` needs it.")


def _isolation() -> Finding:
    """The one finding that is attacked to be known; `rewardsmith sandbox` says all of it."""
    found = probe.report()
    text = f"tier {found.tier}: {found.made_of}"
    if Tier[found.tier] >= Tier.S2:
        return Finding("rewards", "ok", text)
    advice = next((f"{obstacle.reason}. {obstacle.remedy}" for obstacle in found.obstacles if obstacle.remedy), "")
    return Finding("rewards", "note", text, f"It does not stop: {found.not_stopped}. {advice}".strip())


def _home() -> Finding:
    home = default_home()
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        advice = "Set REWARDSMITH_HOME to a folder that you may write to."
        return Finding("home", "bad", f"{home} cannot be written to: {error.strerror}", advice)
    free = f"{shutil.disk_usage(existing).free / GIB:.0f} GiB free"
    token = token_file(home)
    if token.exists() and token.stat().st_mode & 0o077:
        return Finding("home", "note", f"{home}, {free}", f"Other users can read your token: chmod 600 {token}")
    return Finding("home", "ok", f"{home}, {free}" + ("" if home.exists() else ", made at the first start"))


def _server() -> Finding:
    try:
        with Rewardsmith(quiet=True) as rs:
            return Finding("server", "ok", f"answers at {rs.base_url} and accepts the token")
    except ConfigError as error:
        return Finding("server", "note", f"no token for {default_base_url()}", error.message)
    except RewardsmithError as error:
        return Finding("server", "note", f"{default_base_url()} cannot be used", error.message)


def _cgroup(file: str) -> str:
    try:
        return Path("/sys/fs/cgroup", file).read_text()
    except OSError:
        return ""
