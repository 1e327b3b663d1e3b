"""The rules of the tiers: which attack rules out which, what a report says of it, what is enough."""

import pytest

from rewardsmith.errors import SandboxError
from rewardsmith.rewards.inside import attacks
from rewardsmith.rewards.sandbox import tiers
from rewardsmith.rewards.sandbox.advice import explain
from rewardsmith.rewards.sandbox.tiers import Tier, Trial
from rewardsmith.wire import Obstacle, SandboxReport

ALL_STOPPED = {attack: Trial(True, "EPERM") for attack in tiers.ATTACKS}


def but(*through: str) -> dict[str, Trial]:
    return ALL_STOPPED | {attack: Trial(False, "it worked") for attack in through}


def report(tier: str, *obstacles: Obstacle) -> SandboxReport:
    made_of, not_stopped = tiers.MEANING[Tier[tier]]
    return SandboxReport(
        tier=tier,
        made_of=made_of,
        not_stopped=not_stopped,
        protections=[],
        obstacles=list(obstacles),
        hardened=[],
        proc=True,
        user="root",
        kernel="Linux",
        python="3",
        bubblewrap=None,
        version="0",
        seconds=0,
    )


def test_tiers_are_in_order_and_print_as_their_names() -> None:
    assert sorted(Tier) == [Tier.S0, Tier.S1w, Tier.S1, Tier.S2, Tier.S3]
    assert [str(tier) for tier in sorted(Tier)] == ["S0", "S1w", "S1", "S2", "S3"]
    assert f"{Tier.S1w}" == "S1w" and set(tiers.MEANING) == set(Tier)


def test_every_attack_counts_and_every_requirement_is_attacked() -> None:
    assert sorted(attack.__name__ for attack in attacks.ATTACKS) == sorted(tiers.ATTACKS)
    assert len(tiers.ATTACKS) == len(set(tiers.ATTACKS)) >= 12


@pytest.mark.parametrize(
    ("through", "lowest_ruled_out"),
    [
        ("take_memory_in_many_processes", Tier.S3),
        ("start_many_processes", Tier.S2),
        ("fill_temporary_files", Tier.S2),
        ("signal_a_process", Tier.S1),
        ("signal_the_parent_when_enclosed", Tier.S1),
        ("read_a_file", Tier.S1w),
        ("connect_by_tcp", Tier.S1w),
        ("unshare_a_namespace", Tier.S1w),
        ("leave_a_process_behind", Tier.S1w),
    ],
)
def test_an_attack_that_got_through_rules_tiers_out(through: str, lowest_ruled_out: Tier) -> None:
    for tier in Tier:
        gap = tiers.gap(tier, but(through))
        assert (gap is not None) == (tier >= lowest_ruled_out), tier
    assert tiers.gap(Tier.S3, but(through)) == f"{through.replace('_', ' ')} was not stopped: it worked"
    assert tiers.gap(Tier.S3, ALL_STOPPED) is None


def test_rows_say_on_partial_or_off_with_evidence_reason_and_remedy() -> None:
    obstacles = [
        Obstacle(tier="S3", reason="no group", remedy="make one"),
        Obstacle(tier="S2", reason="no bubblewrap", remedy="install it"),
    ]
    through = ("take_memory_in_many_processes", "fill_temporary_files", "send_by_udp")
    rows = {row.name: row for row in tiers.protections(but(*through), obstacles, processes_shared=True)}
    states = {name: row.state for name, row in rows.items() if row.state != "on"}
    assert states == {
        "no network": "partial",
        "number of processes": "partial",
        "temporary files": "off",
        "memory of all processes": "off",
    }
    assert rows["temporary files"].remedy == "install it"
    assert rows["memory of all processes"].remedy == "make one"
    assert "counted together" in (rows["number of processes"].reason or "")
    assert "send by udp: it worked" in rows["no network"].evidence
    assert "connect by tcp: EPERM" in rows["no network"].evidence
    assert (rows["no privileges"].reason, rows["no privileges"].remedy) == (None, None)


def test_what_is_enough() -> None:
    assert tiers.admit(report("S2"), Tier.S1, unsafe=False) == Tier.S2
    assert tiers.admit(report("S1"), Tier.S1, unsafe=False) == Tier.S1
    assert tiers.admit(report("S0"), Tier.S1, unsafe=True) == Tier.S0
    assert tiers.admit(report("S3"), Tier.S1, unsafe=True) == Tier.S3


def test_too_low_a_tier_is_refused_with_reasons_and_remedies() -> None:
    found = report(
        "S1w",
        Obstacle(tier="S2", reason="bubblewrap is not installed", remedy="Install it"),
        Obstacle(tier="S1w", reason="not to be told", remedy=""),
    )
    with pytest.raises(SandboxError) as raised:
        tiers.admit(found, Tier.S2, unsafe=False)
    message = raised.value.message
    assert "tier S2 or better, and this machine has S1w" in message
    assert "- S2: bubblewrap is not installed. Install it" in message
    assert "not to be told" not in message and "rewardsmith sandbox --fresh" in message


ADVICE = {
    "bwrap: No permissions to create new namespace, likely because ...": "--security-opt seccomp=unconfined",
    "bwrap: Creating new namespace failed: Operation not permitted": "--security-opt seccomp=unconfined",
    "bwrap: Creating new namespace failed: nesting depth or /proc/sys/user/max_*_namespaces exceeded (ENOSPC)": "sysctl user.max_user_namespaces",  # noqa: E501
    "bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted": "AppArmor",
    "bwrap: setting up uid map: Permission denied": "AppArmor",
    "bwrap: Can't mount proc on /newroot/proc: Operation not permitted": "systempaths=unconfined",
    "bwrap: Unknown option --size": "0.8 or newer",
    "bubblewrap is not installed": "apt-get install bubblewrap",
    "hardening stopped at files: Landlock ABI 6 is needed, this kernel has 2": "Linux 6.12",
    "[Errno 16] Device or resource busy: '/sys/fs/cgroup/cgroup.subtree_control'": "DelegateSubgroup",
    "[Errno 30] Read-only file system: '/sys/fs/cgroup/rewardsmith-1-0'": "writable",
    "[Errno 13] Permission denied: '/sys/fs/cgroup/memory/rewardsmith-1-0'": "Delegate=yes",
}


@pytest.mark.parametrize(("error", "advice"), ADVICE.items())
def test_errors_are_explained(error: str, advice: str) -> None:
    reason, remedy = explain(error)
    assert advice in remedy + reason
    assert error[:40] in reason, "what was said stays to be read"


def test_an_error_nobody_knows_is_told_as_it_is() -> None:
    assert explain("bwrap: something\n  else\n") == ("a sandbox does not start (bwrap: something else)", "")
    assert explain("") == ("a sandbox does not start (it said nothing)", "")


@pytest.mark.parametrize(
    ("minimum", "unsafe", "expected"),
    [(None, None, (Tier.S1, False)), ("S3", None, (Tier.S3, False)), ("S1w", "1", (Tier.S1w, True))],
)
def test_the_administrator_decides(
    minimum: str | None, unsafe: str | None, expected: tuple[Tier, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ((tiers.MINIMUM_VARIABLE, minimum), (tiers.UNSAFE_VARIABLE, unsafe)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert tiers.policy() == expected


@pytest.mark.parametrize("minimum", ["S0", "S9", "s2"])
def test_no_tier_is_low_enough_without_the_word_unsafe(minimum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tiers.MINIMUM_VARIABLE, minimum)
    with pytest.raises(SandboxError, match=f"not {minimum}; .* --unsafe-rewards"):
        tiers.policy()
