"""How this machine isolates reward functions: the answer of the sandbox's probe."""

from __future__ import annotations

from fastapi import APIRouter

from rewardsmith import wire
from rewardsmith.rewards.sandbox import probe
from rewardsmith.server.auth import Caller

router = APIRouter(prefix="/v2/sandbox", tags=["sandbox"])


@router.get("")
def get_sandbox(caller: Caller, fresh: bool = False) -> wire.SandboxReport:
    """The tier, each protection with its evidence, and what would help; `fresh` attacks a sandbox again."""
    return probe.report(fresh)
