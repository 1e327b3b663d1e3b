"""What a job process reads and reports. `auth` lets in the token of that very job only.

A fence in a body that is not the token's is refused here, one that is out of date by the store (409).
"""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import APIRouter, Path

from rewardsmith import wire
from rewardsmith.errors import Forbidden
from rewardsmith.server.auth import Caller
from rewardsmith.server.context import ConfigOf, StoreOf
from rewardsmith.store import Identity

router = APIRouter(prefix="/v2/journal/{uuid}", tags=["journal"])
Number = Annotated[int, Path(ge=1, lt=2**31)]


@router.get("/spec")
def get_spec(uuid: str, caller: Caller, store: StoreOf, config: ConfigOf) -> wire.JobSpec:
    spec = store.runs.spec(uuid, _fence(caller))
    return spec.model_copy(update={"private_endpoints": list(config.private_endpoints)})


@router.get("/revisions/{number}")
def get_revision(uuid: str, number: Number, caller: Caller, store: StoreOf) -> wire.Revision:
    return store.runs.revision(uuid, number)


@router.post("/heartbeat")
def heartbeat(uuid: str, report: wire.Heartbeat, caller: Caller, store: StoreOf, config: ConfigOf) -> wire.Control:
    _own(caller, report.fence)
    return store.runs.heartbeat(uuid, report, config.lease_seconds)


@router.post("/report")
def report_step(uuid: str, report: wire.StepReport, caller: Caller, store: StoreOf, config: ConfigOf) -> wire.Control:
    _own(caller, report.fence)
    return store.runs.report_step(uuid, report, config.lease_seconds)


@router.post("/checkpoint")
def report_checkpoint(
    uuid: str, report: wire.CheckpointReport, caller: Caller, store: StoreOf, config: ConfigOf
) -> wire.Control:
    _own(caller, report.fence)
    return store.runs.report_checkpoint(uuid, report, config.lease_seconds)


@router.post("/event")
def report_event(uuid: str, report: wire.EventReport, caller: Caller, store: StoreOf, config: ConfigOf) -> wire.Control:
    _own(caller, report.fence)
    return store.runs.report_event(uuid, report, config.lease_seconds)


@router.post("/finish")
def finish(uuid: str, report: wire.Finish, caller: Caller, store: StoreOf, config: ConfigOf) -> wire.Control:
    _own(caller, report.fence)
    return store.runs.finish(uuid, report, config.lease_seconds)


def _fence(caller: Identity) -> int:
    return cast(int, caller.fence)


def _own(caller: Identity, fence: int) -> None:
    if fence != caller.fence:
        raise Forbidden(f"this token is for fence {caller.fence} of the job, not for {fence}")
