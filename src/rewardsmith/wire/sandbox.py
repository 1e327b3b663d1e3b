"""What the sandbox of a machine stops, as its probe found it. Shown by `rewardsmith sandbox` and `GET /v2/sandbox`."""

from __future__ import annotations

from typing import Literal

from rewardsmith.wire.base import Answer

TierName = Literal["S0", "S1w", "S1", "S2", "S3"]


class Protection(Answer):
    """One thing that user code must not do. `evidence` says what the probe tried and what came of it.

    `reason` and `remedy` are there when it is not on: what that means, and what would change it.
    """

    name: str
    state: Literal["on", "partial", "off"]
    evidence: str
    reason: str | None = None
    remedy: str | None = None


class Obstacle(Answer):
    """Why a tier cannot be had on this machine, and what to do about it."""

    tier: TierName
    reason: str
    remedy: str


class SandboxReport(Answer):
    """`tier` is the highest one that was proven; `hardened` names what a process inside took from itself.

    `proc`: a sandbox has a /proc of its own. `seconds` is how long the probe took.
    """

    tier: TierName
    made_of: str
    not_stopped: str
    protections: list[Protection]
    obstacles: list[Obstacle]
    hardened: list[str]
    proc: bool
    user: str
    kernel: str
    python: str
    bubblewrap: str | None
    version: str
    seconds: float
