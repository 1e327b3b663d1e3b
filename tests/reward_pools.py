"""Reward pools for tests, in whatever tier the test is run in, and the processes of their sandboxes from outside."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psutil

from rewardsmith.rewards import source
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.rewards.sandbox import probe
from rewardsmith.rewards.sandbox.limits import Limits
from rewardsmith.rewards.sandbox.tiers import Tier
from rewardsmith.wire import RevisionFunction

SHORT = Limits(call_seconds=0.4, load_seconds=1.0)
TIERS = ("S0", "S1", "best")  # "best" is the one that the machine gives to jobs

_chosen: list[Tier] = []


def choose(name: str) -> Tier | None:
    """The tier for the pools to come; None when the machine does not have it."""
    best = Tier[probe.report().tier]
    tier = best if name == "best" else Tier[name]
    _chosen[:] = [tier]
    return None if tier > best or (name == "best" and tier <= Tier.S1) else tier


def tier() -> Tier:
    return _chosen[0] if _chosen else Tier[probe.report().tier]


def pool(functions: Sequence[RevisionFunction], **settings: Any) -> RewardPool:
    return RewardPool(functions, **{"tier": tier(), **settings})


def named(name: str, function: Callable[..., Any] | str, **settings: Any) -> RevisionFunction:
    per = settings.get("per", "completion")
    text = textwrap.dedent(function).strip() if isinstance(function, str) else source.source_of(function, per)
    return RevisionFunction(name=name, source=text, source_sha256="", **settings)


def score_one(function: Callable[..., Any] | str, completion: str = "c", prompt: str = "p", **settings: Any) -> Score:
    example, limits = settings.pop("example", {}), settings.pop("limits", SHORT)
    with pool([named("f", function, **settings)], workers=1, limits=limits) as one:
        return one.score([Group(prompt, example, [completion])])[0][0]["f"]


def processes() -> list[psutil.Process]:
    """All that was started from here and runs, those in sandboxes too."""
    return [child for child in psutil.Process().children(recursive=True) if _parent_of(child) is not None]


def leaves() -> list[psutil.Process]:
    """The innermost ones: executors, and what they started."""
    found = [(process, _parent_of(process)) for process in processes()]
    parents = {parent for _, parent in found}
    return [process for process, parent in found if parent is not None and process.pid not in parents]


def _parent_of(process: psutil.Process) -> int | None:
    """None when it has ended, which it may do at any moment."""
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.ppid()
    except psutil.NoSuchProcess:
        return None


def kill_all() -> None:
    """One that is killed may take others with it."""
    for process in processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()
