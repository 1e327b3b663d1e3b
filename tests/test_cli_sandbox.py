"""`rewardsmith sandbox`, its route and its SDK twin: the same report, for people and for programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from processes import Server

from rewardsmith.rewards.sandbox.tiers import REQUIREMENTS, Tier
from rewardsmith.wire import SandboxReport


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def sandbox(cache: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rewardsmith", "sandbox", *arguments],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_as_json(cache: Path) -> None:
    done = sandbox(cache, "--json", "--fresh")
    report = SandboxReport.model_validate_json(done.stdout)
    assert done.returncode == (0 if Tier[report.tier] >= Tier.S1 else 1), done.stderr
    assert [row.name for row in report.protections] == [requirement.name for requirement in REQUIREMENTS]
    assert "made_of" in json.loads(done.stdout), "names as in Python"
    again = SandboxReport.model_validate_json(sandbox(cache, "--json").stdout)
    assert again == report, "from the cache"


def test_for_people(cache: Path) -> None:
    report = SandboxReport.model_validate_json(sandbox(cache, "--json").stdout)
    shown = sandbox(cache).stdout
    assert shown.startswith(f"Tier {report.tier}: {report.made_of}")
    assert report.not_stopped in shown
    for row in report.protections:
        assert row.name in shown and row.evidence in shown
    for obstacle in report.obstacles:
        assert obstacle.remedy in shown


def test_without_bubblewrap_the_remedy_is_shown(cache: Path, tmp_path: Path) -> None:
    for name in ("sleep", "sh"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    done = sandbox(tmp_path / "cache", PATH=str(tmp_path))
    assert "What keeps a higher tier away" in done.stdout
    assert "bubblewrap is not installed. Install it: `apt-get install bubblewrap`" in done.stdout


def test_the_server_and_the_sdk_say_the_same(server: Server) -> None:
    with server.client() as rs:
        report = rs.sandbox()
        assert Tier[report.tier] in Tier and report.protections
        assert rs.sandbox(fresh=True).tier == report.tier
    assert httpx.get(f"{server.url}/v2/sandbox").status_code == 401
    token = (server.home / "owner-token").read_text().strip()
    answer = httpx.get(f"{server.url}/v2/sandbox", headers={"Authorization": f"Bearer {token}"}).json()
    assert answer["tier"] == report.tier and {"madeOf", "notStopped", "protections"} <= set(answer)
