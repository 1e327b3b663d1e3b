"""Revisions of a job's reward functions: change them, look at what they were, try a change first, go back.

`PUT .../config` is the original's door (contract 1.6), the rest is our own. What each form of a change means is in
`changes`, how one is tried in `dry_run`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Response

from rewardsmith import wire
from rewardsmith.errors import Conflict
from rewardsmith.reward_config import RewardFunctionsConfig
from rewardsmith.server import changes, difference, dry_run
from rewardsmith.server.auth import Caller
from rewardsmith.server.context import ConfigOf, DryRunsOf, StoreOf
from rewardsmith.store import Store

router = APIRouter(prefix="/v2/finetuning/jobs/{uuid}", tags=["revisions"])
Number = Annotated[int, Path(ge=1, lt=2**31)]


@router.put("/config", response_model=wire.Revision, responses={204: {"description": "nothing differs"}})
def change_rewards(
    uuid: str, config: Annotated[dict[str, Any], Body()], caller: Caller, store: StoreOf
) -> wire.Revision | Response:
    """The whole config with other reward functions; they score from one of the next steps on."""
    job = _running(uuid, store)
    made = _make(store, job, changes.of_config(job, config, store.secrets.of_job(uuid)), caller.username)
    return made or Response(status_code=204)


@router.get("/revisions")
def list_revisions(uuid: str, caller: Caller, store: StoreOf) -> list[wire.Revision]:
    """Every set of reward functions the job has had, oldest first."""
    return store.runs.revisions(uuid)


@router.post("/revisions")
def apply_change(uuid: str, request: wire.RevisionRequest, caller: Caller, store: StoreOf) -> wire.Revision:
    """Make the next revision; it scores from one of the next steps on. Where nothing differs, the present one."""
    job = _running(uuid, store)
    wanted = changes.of_change(job, request)
    made = _make(store, job, wanted, caller.username, request.note, request.compared_steps)
    return made or store.runs.revision(uuid, job.revision)


@router.post("/revisions/dry-run")
def try_change(
    uuid: str, request: wire.DryRunRequest, caller: Caller, store: StoreOf, config: ConfigOf, dry_runs: DryRunsOf
) -> wire.DryRun:
    """What a change would have meant for completions that the job has stored. Nothing changes by it."""
    job = store.runs.get(uuid)
    with dry_runs.turn(uuid):
        return dry_run.run(store, job, request, config.private_endpoints)


@router.get("/revisions/{number}")
def get_revision(uuid: str, number: Number, caller: Caller, store: StoreOf) -> wire.Revision:
    return store.runs.revision(uuid, number)


@router.get("/revisions/{number}/diff")
def diff_revision(
    uuid: str,
    number: Number,
    caller: Caller,
    store: StoreOf,
    against: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
) -> wire.RevisionDiff:
    """What it changed, against the revision that was in effect before it or any other one."""
    new = store.runs.revision(uuid, number)
    before = against or new.replaces
    return difference.between(None if before is None else store.runs.revision(uuid, before), new)


@router.post("/revisions/{number}/rollback")
def roll_back(
    uuid: str, number: Number, request: wire.RollbackRequest, caller: Caller, store: StoreOf
) -> wire.Revision:
    """Make a new revision with the functions of an earlier one. Where nothing differs, the present one."""
    job = _running(uuid, store)
    note = f"rollback to revision {number}" + (f": {request.note}" if request.note else "")
    made = _make(store, job, changes.of_revision(store, uuid, number), caller.username, note)
    return made or store.runs.revision(uuid, job.revision)


def _running(uuid: str, store: Store) -> wire.Job:
    job = store.runs.get(uuid)
    if job.status in wire.TERMINAL:
        raise Conflict(f"the job is {job.status}; its reward functions can change only while it runs")
    return job


def _make(
    store: Store,
    job: wire.Job,
    wanted: RewardFunctionsConfig,
    author: str,
    note: str | None = None,
    compared_steps: int | None = None,
) -> wire.Revision | None:
    """The new revision; None when nothing differs."""
    changed = changes.checked(job, wanted)
    if changed is None:
        return None
    steps = changes.compared_steps(job) if compared_steps is None else compared_steps
    return store.runs.add_revision(
        job.uuid,
        changed.params,
        changed.functions,
        author,
        note=note,
        compared_steps=steps,
        base=job.revision,
    )
