"""Jobs: submit, steer, and read everything a run tells (contract 1.5, 5.1, and our own)."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocket

from rewardsmith import wire
from rewardsmith.errors import ConfigError, NotFound
from rewardsmith.jobs.local import log_file, tail
from rewardsmith.rewards.outcomes import Outcome
from rewardsmith.server import events, submission
from rewardsmith.server.auth import Caller
from rewardsmith.server.boundary import refusal
from rewardsmith.server.context import ConfigOf, StoreOf

router = APIRouter(prefix="/v2/finetuning/jobs", tags=["jobs"])
Count = Annotated[int, Query(ge=0, lt=2**31)]
Limit = Annotated[int, Query(ge=1, le=500)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=200)]
UserAgent = Annotated[str, Header(alias="User-Agent")]


def _function_of_job(uuid: str, store: StoreOf, function: str | None = None) -> str | None:
    """The filter by reward function. A name the job never had would look like an empty result: ConfigError."""
    if function is not None:
        known = {f.name: None for revision in store.runs.revisions(uuid) for f in revision.functions}
        if function not in known:
            raise ConfigError(f"the job has no reward function {function!r}; it has {', '.join(known)}")
    return function


FunctionOfJob = Annotated[str | None, Depends(_function_of_job)]


@router.post("")
def create_job(
    request: wire.JobRequest, caller: Caller, store: StoreOf, idempotency_key: Key = None, user_agent: UserAgent = ""
) -> wire.Job:
    """The same request again gives the same job: by Idempotency-Key, or without one by body for 30 s."""
    body_sha256 = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    job = store.runs.find_repeat(caller.user_id, idempotency_key, body_sha256)
    if job is None:
        checked = submission.check_job(request, store)
        job = store.runs.create_job(
            user_id=caller.user_id,
            repo=request.repo,
            dataset=checked.dataset,
            base_model=checked.base_model,
            base_model_source=checked.base_model_source,
            params=checked.params,
            functions=checked.functions,
            description=request.description,
            continue_from=request.continue_from_version,
            idempotency_key=idempotency_key,
            body_sha256=body_sha256,
            job_secrets=checked.secrets,
        )
    return _readable_by(user_agent, job)


@router.get("")
def list_jobs(
    caller: Caller,
    store: StoreOf,
    limit: Limit = 50,
    status: wire.JobStatus | None = None,
    repo: str | None = None,
    after: str | None = None,
) -> dict[str, Any]:
    """The newest first; `next` goes back as `after`."""
    jobs, following = store.runs.list(limit=limit, status=status, repo=repo, after=after)
    return {"data": {"jobs": [job.model_dump(mode="json", by_alias=True) for job in jobs]}, "next": following}


@router.get("/cost-estimate")
async def estimate_cost(caller: Caller) -> wire.CostEstimate:
    """Nothing: the machine is the caller's. The stock SDK asks with a body, which is not needed."""
    return wire.CostEstimate()


@router.get("/{uuid}")
def get_job(uuid: str, caller: Caller, store: StoreOf, user_agent: UserAgent = "") -> wire.Job:
    return _readable_by(user_agent, store.runs.get(uuid))


@router.get("/{uuid}/timeline")
def get_timeline(uuid: str, caller: Caller, store: StoreOf) -> dict[str, dict[str, str]]:
    return store.runs.timeline(uuid)


@router.get("/{uuid}/tensorboard_logs")
def get_tensorboard_logs(uuid: str, caller: Caller, store: StoreOf) -> dict[str, Any]:
    """There are none; the stock SDK asks."""
    store.runs.get(uuid)
    return {"files": [], "more": False}


@router.post("/{uuid}/cancel")
def cancel_job(uuid: str, caller: Caller, store: StoreOf) -> wire.Job:
    """End it at once, without an adapter; its checkpoints stay, as `repo/version@checkpoint`."""
    return store.runs.request(uuid, "cancel")


@router.post("/{uuid}/stop")
def stop_job(uuid: str, caller: Caller, store: StoreOf) -> wire.Job:
    """End it after the current step; its best checkpoint becomes the adapter."""
    return store.runs.request(uuid, "stop")


@router.post("/{uuid}/resume")
def resume_job(uuid: str, caller: Caller, store: StoreOf) -> wire.Job:
    """Let a paused job go on as it is."""
    return store.runs.request(uuid, "resume")


@router.get("/{uuid}/events")
def list_events(uuid: str, caller: Caller, store: StoreOf) -> list[wire.JobEvent]:
    """The timeline, oldest first."""
    return store.runs.events(uuid)


@router.get("/{uuid}/metrics")
def get_metrics(
    uuid: str,
    caller: Caller,
    store: StoreOf,
    series: Annotated[list[str] | None, Query()] = None,
    after_step: Annotated[int, Query(ge=-1, lt=2**31)] = -1,
) -> dict[str, dict[str, list[wire.MetricPoint]]]:
    """Points by series; `series` may be repeated, without it all are given."""
    return {"series": store.telemetry.metrics(uuid, series, after_step)}


@router.get("/{uuid}/completions")
def list_completions(
    uuid: str,
    caller: Caller,
    store: StoreOf,
    function: FunctionOfJob,
    step: Count | None = None,
    phase: Literal["train", "eval"] | None = None,
    row: Count | None = None,
    outcome: Outcome | None = None,
    min_score: float | None = None,
    max_score: float | None = None,
    text: str | None = None,
    order: Literal["newest", "oldest"] = "newest",
    after: str | None = None,
    limit: Limit = 50,
) -> wire.Page:
    """Stored completions that fit every filter; scores are about `function`, or about the total without one."""
    return store.completions.completions(
        uuid,
        step=step,
        phase=phase,
        row=row,
        function=function,
        outcome=outcome,
        min_score=min_score,
        max_score=max_score,
        text=text,
        order=order,
        after=after,
        limit=limit,
    )


class FoldQuery(wire.LogFilters):
    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=500)] = 50


class LogQuery(FoldQuery):
    order: Literal["newest", "oldest"] = "newest"


@router.get("/{uuid}/reward-logs")
def list_reward_logs(uuid: str, query: Annotated[LogQuery, Query()], caller: Caller, store: StoreOf) -> wire.Page:
    """Calls of reward functions: what they printed and how they failed, and with `every` all others too."""
    _function_of_job(uuid, store, query.function)
    return store.completions.reward_logs(uuid, query, order=query.order, after=query.after, limit=query.limit)


@router.get("/{uuid}/reward-logs/folded")
def fold_reward_logs(
    uuid: str, query: Annotated[FoldQuery, Query()], caller: Caller, store: StoreOf
) -> wire.FoldedLogs:
    """The same, calls that said the same but for numbers as one with a count, the most frequent first."""
    _function_of_job(uuid, store, query.function)
    return store.completions.folded_logs(uuid, query, after=query.after, limit=query.limit)


@router.get("/{uuid}/log", response_class=PlainTextResponse)
def get_log(
    uuid: str,
    caller: Caller,
    store: StoreOf,
    config: ConfigOf,
    attempt: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
) -> str:
    """The end of what the job's process wrote, by default in its last attempt."""
    last = store.runs.get(uuid).attempt
    if attempt is not None and attempt > last:
        raise NotFound(f"the job has had {last} attempts, not {attempt}")
    return tail(log_file(config.home, uuid, attempt or last))


@router.get("/{uuid}/events/stream", response_class=StreamingResponse)
def stream_events(
    uuid: str,
    caller: Caller,
    store: StoreOf,
    request: Request,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> StreamingResponse:
    """Server-sent events `job`, `step` and `event`, from the beginning or from Last-Event-ID, until the job's end."""
    cursor = events.Cursor.parse(last_event_id)
    store.runs.get(uuid)
    frames = events.server_sent(store, uuid, cursor, request.app.state.closing)
    # Else nginx would hold the events back.
    return StreamingResponse(frames, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


@router.websocket("/{uuid}/metrics/stream")
async def stream_metrics(websocket: WebSocket, uuid: str) -> None:
    state = websocket.app.state
    try:
        await run_in_threadpool(state.store.runs.get, uuid)
    except NotFound as error:
        await websocket.send_denial_response(refusal(websocket.scope, error.status, error.message))
        return
    await events.stream_metrics(websocket, state.store, uuid, state.closing)


def _readable_by(user_agent: str, job: wire.Job) -> wire.Job:
    """The stock SDK cannot read a 0 in these two fields, though it is the default of one (contract 8)."""
    if not user_agent.startswith("predibase-sdk/"):
        return job
    refused = {name for name in ("lora_dropout", "warmup_ratio") if job.params.get(name) == 0}
    return job.model_copy(update={"params": {k: v for k, v in job.params.items() if k not in refused}})
