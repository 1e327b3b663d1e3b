"""The probe on this machine, and on ones that are worse: every tier is earned, and a hole is found."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from boxes import as_nobody, here, needs, python_for_all

from rewardsmith.errors import SandboxError
from rewardsmith.rewards.inside import landlock
from rewardsmith.rewards.sandbox import build, probe, tiers
from rewardsmith.rewards.sandbox.tiers import Tier
from rewardsmith.wire import SandboxReport

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is tried")
ASK = "from rewardsmith.rewards.sandbox import probe; print(probe.report(fresh=True).model_dump_json())"
CONTAINER = Path(__file__).with_name("container_filter.py")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "_known", {})
    return tmp_path / "cache" / "rewardsmith" / "sandbox.json"


def rows(report: SandboxReport) -> dict[str, str]:
    return {row.name: row.state for row in report.protections}


@pytest.fixture
def without_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "sleep").symlink_to(shutil.which("sleep"))
    monkeypatch.setenv("PATH", str(folder))


def test_the_tier_of_this_machine_is_proven() -> None:
    report = probe.report(fresh=True)
    tier = Tier[report.tier]
    assert len(report.protections) == len(tiers.REQUIREMENTS)
    for requirement, row in zip(tiers.REQUIREMENTS, report.protections, strict=True):
        assert row.evidence, row.name
        if requirement.tier <= tier:
            assert row.state == "on", row
        if row.state != "on":
            assert row.reason, row.name
    assert (report.made_of, report.not_stopped) == tiers.MEANING[tier]
    assert bool(report.obstacles) == (tier < Tier.S3)
    if tier >= Tier.S2:
        assert report.bubblewrap and "system call filter" in report.hardened


def test_without_bubblewrap_it_is_s1_and_says_how_to_get_more(without_bubblewrap: None) -> None:
    if landlock.abi() < 6:
        pytest.skip("this kernel's Landlock is too old for S1")
    report = probe.report(fresh=True)
    assert (report.tier, report.bubblewrap) == ("S1", None)
    assert any("apt-get install bubblewrap" in obstacle.remedy for obstacle in report.obstacles)
    states = rows(report)
    assert states["temporary files"] == "off"
    assert {states[r.name] for r in tiers.REQUIREMENTS if r.tier <= Tier.S1} == {"on"}


@pytest.mark.parametrize("as_root", [True, False])
def test_in_a_container_that_refuses_namespaces_it_is_s1(as_root: bool, tmp_path: Path) -> None:
    if landlock.abi() < 6:
        pytest.skip("this kernel's Landlock is too old for S1")
    if as_root:
        command = [sys.executable, str(CONTAINER), sys.executable, "-c", ASK]
        done = subprocess.run(command, capture_output=True, text=True)
    else:
        python = python_for_all()
        program = f"import os; os.execv({python!r}, [{python!r}, {str(CONTAINER)!r}, {python!r}, '-c', {ASK!r}])"
        done = as_nobody(program)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tier"] == "S1", report
    if shutil.which("bwrap"):
        assert any("filter of a container" in obstacle["reason"] for obstacle in report["obstacles"])
        assert any("--security-opt" in obstacle["remedy"] for obstacle in report["obstacles"])


def test_a_user_without_rights_has_a_tier_of_its_own() -> None:
    done = as_nobody(ASK)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["user"] == "user id 65534"
    if here() >= Tier.S2 and not any("namespaces" in obstacle["reason"] for obstacle in report["obstacles"]):
        assert report["tier"] in ("S2", "S3")
    if report["tier"] == "S2":
        assert any("cgroup" in obstacle["reason"] for obstacle in report["obstacles"])


# (step left out, in a box or not, first attack that gets through). In a box, the mounts hide files as Landlock does.
HOLES = (
    ("_system_calls", True, "open another kind of socket"),
    ("_system_calls", False, "change the mode of a file"),
    ("_user", True, "gain privileges"),
    ("_user", False, "gain privileges"),
    ("_resources", True, "take memory"),
    ("_resources", False, "take memory"),
    ("_files", False, "read a file"),
)


@pytest.mark.parametrize(("step", "boxed", "attack"), HOLES)
def test_a_hole_in_the_hardening_is_found(
    step: str, boxed: bool, attack: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    needs(Tier.S2 if boxed else Tier.S1)
    if step == "_user" and os.geteuid() != 0:
        pytest.skip("only root has privileges to lose")
    if not boxed:
        request.getfixturevalue("without_bubblewrap")
    inside = tmp_path / "inside"
    shutil.copytree(build.INSIDE, inside)
    text = (inside / "harden.py").read_text()
    assert text.count(f"{step}, ") == 1
    (inside / "harden.py").write_text(text.replace(f"{step}, ", ""))
    monkeypatch.setattr(build, "INSIDE", inside)
    report = probe.report(fresh=True)
    assert report.tier == "S0"
    assert any(f"{attack} was not stopped" in obstacle.reason for obstacle in report.obstacles), report.obstacles


def test_a_hole_in_the_box_is_found(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bubblewrap without a network namespace, the filter as it is: the loopback of the machine is open."""
    needs(Tier.S2)
    own_cache.unlink()
    folder = own_cache.parents[1] / "programs"
    folder.mkdir()
    real = shutil.which("bwrap")
    (folder / "bwrap").write_text(
        f'#!/bin/sh\nfor word; do shift; [ "$word" = --unshare-net ] || set -- "$@" "$word"; done\nexec {real} "$@"\n'
    )
    (folder / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    report = probe.report(fresh=True)
    assert Tier[report.tier] < Tier.S2
    assert any("send by udp was not stopped" in obstacle.reason for obstacle in report.obstacles)
    assert not own_cache.exists(), "a surprise is not kept"


def test_the_answer_is_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = probe.report()
    assert probe.report() is first
    monkeypatch.setattr(probe, "_known", {})
    assert probe.report() == first and probe.report() is not first, "read from the file"
    assert own_cache.stat().st_mode & 0o777 == 0o600
    assert probe.report(fresh=True).seconds != first.seconds


def forge(file: Path, **changes: object) -> None:
    kept = json.loads(file.read_text())
    kept["report"]["python"] = "forged"
    file.write_text(json.dumps(kept | changes))


def test_a_kept_answer_for_other_surroundings_does_not_count(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe.report()
    forge(own_cache)
    monkeypatch.setattr(probe, "_known", {})
    assert probe.report().python == "forged", "the file is what is read"
    forge(own_cache, key="of another machine")
    monkeypatch.setattr(probe, "_known", {})
    assert probe.report().python != "forged"


def test_a_kept_answer_that_others_could_have_written_does_not_count(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe.report()
    forge(own_cache)
    own_cache.chmod(0o666)
    monkeypatch.setattr(probe, "_known", {})
    assert probe.report().python != "forged"
    own_cache.write_text("{ no JSON")
    monkeypatch.setattr(probe, "_known", {})
    assert probe.report().python != "forged"


def test_what_is_required_is_looked_at_again_before_it_is_refused(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(Tier.S1)
    probe.report()
    kept = json.loads(own_cache.read_text())
    kept["report"]["tier"] = "S0"
    own_cache.write_text(json.dumps(kept))
    monkeypatch.setattr(probe, "_known", {})
    assert probe.required(Tier.S1, unsafe=False) >= Tier.S1


def test_below_the_minimum_is_refused_unless_unsafe(without_bubblewrap: None) -> None:
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        probe.required(Tier.S2, unsafe=False)
    assert probe.required(Tier.S2, unsafe=True) < Tier.S2
