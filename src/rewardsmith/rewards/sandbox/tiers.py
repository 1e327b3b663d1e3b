"""The tiers of a sandbox, what each must stop, and which is enough. Names and rules only; `probe` finds the facts.

A tier is what was proven: an attack of `inside.attacks` that a tier must stop and that got through rules the tier out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, cast

from rewardsmith.errors import SandboxError
from rewardsmith.wire import Obstacle, Protection, SandboxReport
from rewardsmith.wire.sandbox import TierName


class Tier(IntEnum):
    S0 = 0
    S1w = 1
    S1 = 2
    S2 = 3
    S3 = 4

    def __str__(self) -> str:
        return self.name

    @property
    def wire_name(self) -> TierName:
        return cast(TierName, self.name)


# tier: (what it is made of, what it does not stop)
MEANING = {
    Tier.S3: (
        "namespaces, Landlock, system call filter, resource limits, memory of the whole sandbox",
        "bugs of the kernel, timing side channels, a reward function that forges its own scores",
    ),
    Tier.S2: (
        "namespaces, Landlock, system call filter, resource limits",
        "many processes that use up memory together; bugs of the kernel; a reward function that forges its own scores",
    ),
    Tier.S1: (
        "Landlock, system call filter, resource limits",
        "many processes that use up memory together, a full disk, an exact number of processes; network for chosen "
        "hosts cannot be had; bugs of the kernel; a reward function that forges its own scores",
    ),
    Tier.S1w: (
        "an older Landlock, system call filter, resource limits",
        "signals to the other processes of its user, and what S1 does not stop",
    ),
    Tier.S0: (
        "separate processes with resource limits and an empty environment",
        "reading your files, using the network, signalling your other processes",
    ),
}


@dataclass(frozen=True)
class Requirement:
    """What user code must not do, from which tier on, and the attacks that try it. `otherwise`: what if it can."""

    name: str
    tier: Tier
    attacks: tuple[str, ...]
    otherwise: str


REQUIREMENTS = (
    Requirement("files are not read", Tier.S1w, ("read_a_file",), "user code reads what this user reads"),
    Requirement(
        "files are not changed",
        Tier.S1w,
        ("write_a_file", "change_the_mode_of_a_file"),
        "user code changes what this user may change",
    ),
    Requirement(
        "no network",
        Tier.S1w,
        (
            "connect_by_tcp",
            "send_by_udp",
            "connect_to_a_socket_file",
            "connect_to_an_abstract_socket",
            "open_another_kind_of_socket",
        ),
        "user code reaches services of this machine and the network",
    ),
    Requirement(
        "other processes are out of sight",
        Tier.S1w,
        ("see_a_process", "read_an_environment", "trace_a_process", "change_the_limits_of_a_process"),
        "user code sees other processes, or more",
    ),
    Requirement(
        "other processes get no signals",
        Tier.S1,
        ("signal_a_process",),
        "user code can end the other processes of its user, the job's own too",
    ),
    Requirement(
        "the kernel's side doors are shut",
        Tier.S1w,
        ("unshare_a_namespace", "clone_a_namespace", "open_doors_of_the_kernel"),
        "more of the kernel can be attacked",
    ),
    Requirement("no privileges", Tier.S1w, ("gain_privileges",), "user code has rights of root"),
    Requirement(
        "nothing is left running",
        Tier.S1w,
        ("leave_a_process_behind",),
        "a process that user code starts can outlive the job",
    ),
    Requirement(
        "run_python is enclosed",
        Tier.S1,
        ("signal_the_parent_when_enclosed",),
        "text of the model that `run_python` runs can disturb the reward function",
    ),
    Requirement("memory of a process", Tier.S1w, ("take_memory",), "one process can take all memory"),
    Requirement("number of processes", Tier.S2, ("start_many_processes",), "a fork bomb is not bounded"),
    Requirement("temporary files", Tier.S2, ("fill_temporary_files",), "temporary files are on disk and can fill it"),
    Requirement(
        "memory of all processes",
        Tier.S3,
        ("take_memory_in_many_processes",),
        "each process is bounded, all together are not",
    ),
)

# What the administrator decides, see `policy`.
MINIMUM_VARIABLE, UNSAFE_VARIABLE = "REWARDSMITH_MIN_SANDBOX", "REWARDSMITH_UNSAFE_REWARDS"

ATTACKS = tuple(attack for requirement in REQUIREMENTS for attack in requirement.attacks)


@dataclass(frozen=True)
class Trial:
    """How one attack went: what stopped it, or what it got away with."""

    stopped: bool
    evidence: str


def gap(tier: Tier, trials: Mapping[str, Trial]) -> str | None:
    """The first attack that got through although this tier must stop it, for people; None when there is none."""
    for requirement in REQUIREMENTS:
        for attack in requirement.attacks if requirement.tier <= tier else ():
            if not trials[attack].stopped:
                return f"{_words(attack)} was not stopped: {trials[attack].evidence}"
    return None


def protections(
    trials: Mapping[str, Trial], obstacles: Sequence[Obstacle], *, processes_shared: bool
) -> list[Protection]:
    """A row for each requirement. `processes_shared`: other processes of the user count against the same limit."""
    rows = []
    for requirement in REQUIREMENTS:
        found = {attack: trials[attack] for attack in requirement.attacks}
        stopped = sum(trial.stopped for trial in found.values())
        state: Literal["on", "partial", "off"] = "on"
        reason = remedy = None
        if stopped < len(found):
            state, reason = "partial" if stopped else "off", requirement.otherwise
        elif processes_shared and requirement.name == "number of processes":
            state, reason = "partial", "it is counted together with the other processes of this user"
        if state != "on":
            in_the_way = [obstacle for obstacle in obstacles if Tier[obstacle.tier] >= requirement.tier]
            remedy = in_the_way[-1].remedy or None if in_the_way else None
        evidence = "; ".join(f"{_words(attack)}: {trial.evidence}" for attack, trial in found.items())
        rows.append(Protection(name=requirement.name, state=state, evidence=evidence, reason=reason, remedy=remedy))
    return rows


def admit(report: SandboxReport, minimum: Tier, unsafe: bool) -> Tier:
    """The tier to run user code in. Below the minimum SandboxError says reasons and remedies, unless `unsafe`."""
    tier = Tier[report.tier]
    if tier >= minimum or unsafe:
        return tier
    in_the_way = [obstacle for obstacle in report.obstacles if Tier[obstacle.tier] >= minimum]
    reasons = "".join(f"\n- {obstacle.tier}: {obstacle.reason}. {obstacle.remedy}".rstrip() for obstacle in in_the_way)
    raise SandboxError(
        f"reward functions run in a sandbox of tier {minimum} or better, and this machine has {tier}, which does not "
        f"stop: {report.not_stopped}.{reasons}\n`rewardsmith sandbox --fresh` looks again and shows all of it"
    )


def policy() -> tuple[Tier, bool]:
    """The lowest tier that user code may run in here, and whether it may run below all the same.

    From the environment, where `rewardsmith serve` puts what it was started with, for itself and for its jobs: no job
    can ask for less. Raises SandboxError for a tier that does not exist, and for S0: that takes the word "unsafe".
    """
    name = os.environ.get(MINIMUM_VARIABLE) or Tier.S1.name
    tiers = [tier.name for tier in Tier if tier > Tier.S0]
    if name not in tiers:
        raise SandboxError(
            f"the lowest tier (--min-sandbox, {MINIMUM_VARIABLE}) is one of {', '.join(tiers)}, not {name}; to run "
            "reward functions where nothing keeps them in, start the server with --unsafe-rewards"
        )
    return Tier[name], os.environ.get(UNSAFE_VARIABLE) == "1"


def _words(attack: str) -> str:
    return attack.replace("_", " ")
