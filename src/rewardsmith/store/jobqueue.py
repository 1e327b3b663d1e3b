"""The queue on the `jobs` table: claim, lease, fence, and what happens to a job whose process went away.

Functions on an open write transaction; times are the store's. A claim raises the fence, and from then on whatever an
earlier attempt writes is refused. What that attempt reported beyond its last training state is truncated with the
claim, so that the new attempt reports those steps again.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, func, or_, select, update

from rewardsmith import wire
from rewardsmith.errors import Conflict
from rewardsmith.store import jobrows, revisions
from rewardsmith.store.registry import add_token
from rewardsmith.store.schema import checkpoints, job_events, jobs, metrics, now, segments, steps

LONGEST_BACKOFF_SECONDS = 60


@dataclass(frozen=True)
class Claim:
    """One attempt to run a job. `token` is the job's secret, told only here."""

    uuid: str
    fence: int
    attempt: int
    token: str


@dataclass(frozen=True)
class LiveJob:
    """A job that a process should be running, by the store's clock.

    `expired`: its lease ran out. `canceling_seconds`: since it was asked to cancel, None when it was not.
    """

    uuid: str
    status: str
    fence: int
    attempt: int
    host: str
    handle: str | None
    lease_until: datetime
    expired: bool
    canceling_seconds: float | None


def claim(connection: Connection, host: str, lease_seconds: float) -> Claim | None:
    """Take the oldest job that waits and is not backing off; None when there is none."""
    waiting = (
        select(jobs)
        .where(jobs.c.status == "queued", or_(jobs.c.backoff_until.is_(None), jobs.c.backoff_until <= now()))
        .order_by(jobs.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)  # for Postgres; on SQLite the transaction is alone
    )
    job = connection.execute(waiting).one_or_none()
    if job is None:
        return None
    point = jobrows.resume_point(connection, job)
    step = point.step if point else 0
    _truncate(connection, job, step)
    values = {
        "fence": job.fence + 1,
        "attempt": job.attempt + 1,
        "host": host,
        "handle": None,
        "lease_until": now() + timedelta(seconds=lease_seconds),
        "backoff_until": None,
        "step": step,
        "total_reward": _total_reward(connection, job, step),
    }
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
    job = jobrows.find(connection, job.uuid)
    begins = f"attempt {job.attempt} on {host}, after step {step}" if job.attempt > 1 else f"on {host}"
    kind = "restarted" if job.attempt > 1 else "status"
    jobrows.enter(connection, job, "training", f"training {begins}", kind=kind)
    token = secrets.token_urlsafe(32)
    add_token(connection, token, job.user_id, job.id, job.fence)
    return Claim(job.uuid, job.fence, job.attempt, token)


def _truncate(connection: Connection, job: Row[Any], step: int) -> None:
    for table in (metrics, segments, steps):
        connection.execute(delete(table).where(table.c.job_id == job.id, table.c.step > step))
    beyond = (checkpoints.c.version_id == job.version_id) & (checkpoints.c.step > step)
    connection.execute(delete(checkpoints).where(beyond))
    revisions.truncate(connection, job, step)


def _total_reward(connection: Connection, job: Row[Any], step: int) -> float | None:
    here = (metrics.c.job_id == job.id) & (metrics.c.step == step) & (metrics.c.series == "total_reward")
    return connection.scalar(select(metrics.c.value).where(here))


def set_handle(connection: Connection, uuid: str, fence: int, handle: str) -> None:
    """Also of a job that has ended by now: its process was faster than the dispatcher."""
    held = update(jobs).where(jobs.c.uuid == uuid, jobs.c.fence == fence)
    if not connection.execute(held.values(handle=handle)).rowcount:
        raise Conflict(f"fence {fence} does not hold job {uuid}")


def live(connection: Connection) -> list[LiveJob]:
    clock = now()
    asked_at = (
        select(func.max(job_events.c.at))
        .where(job_events.c.job_id == jobs.c.id, job_events.c.status == "stopping", jobs.c.action == "cancel")
        .scalar_subquery()
    )
    query = select(jobs, asked_at.label("asked_at")).where(jobs.c.status.in_(jobrows.LIVE)).order_by(jobs.c.id)
    return [
        LiveJob(
            uuid=job.uuid,
            status=job.status,
            fence=job.fence,
            attempt=job.attempt,
            host=job.host,
            handle=job.handle,
            lease_until=job.lease_until,
            expired=job.lease_until < clock,
            canceling_seconds=(clock - job.asked_at).total_seconds() if job.asked_at else None,
        )
        for job in connection.execute(query)
    ]


def extend_leases(connection: Connection, seconds: float) -> None:
    lease_until = now() + timedelta(seconds=seconds)
    connection.execute(update(jobs).where(jobs.c.status.in_(jobrows.LIVE)).values(lease_until=lease_until))


def release(connection: Connection, uuid: str, fence: int) -> None:
    """Put back a job whose process yielded, or end it as it was asked to."""
    job = jobrows.fenced(connection, uuid, fence)
    if not _ended_as_asked(connection, job):
        jobrows.enter(connection, job, "queued", f"queued again: attempt {job.attempt} yielded", lease_until=None)


def fail_attempt(connection: Connection, uuid: str, fence: int, reason: str, max_attempts: int) -> None:
    """Put back a job whose process died, with backoff, or end it: as it was asked to, or as errored."""
    job = jobrows.fenced(connection, uuid, fence, failures=jobs.c.failures + 1)
    if _ended_as_asked(connection, job):
        return
    if job.failures >= max_attempts:
        many = f"{job.failures} attempts in a row made no progress; the last one: "
        jobrows.end_without_process(connection, job, "errored", (many if job.failures > 1 else "") + reason)
        return
    wait = min(2 ** (job.failures - 1), LONGEST_BACKOFF_SECONDS)
    message = f"queued again for {wait} s: attempt {job.attempt} failed: {reason}"
    jobrows.enter(connection, job, "queued", message, lease_until=None, backoff_until=now() + timedelta(seconds=wait))


def _ended_as_asked(connection: Connection, job: Row[Any]) -> bool:
    """End a job without a process that was asked to end; False for one that is to go on."""
    if job.action == "continue":
        return False
    jobrows.end_without_process(connection, job, "canceled" if job.action == "cancel" else "stopped")
    return True


def spec(connection: Connection, uuid: str, fence: int, artifacts_url: str) -> wire.JobSpec:
    """What the process of this attempt is to do."""
    job = jobrows.fenced(connection, uuid, fence)
    resume = jobrows.resume_point(connection, job)
    revision, params = revisions.in_effect_at(connection, job, resume.step if resume else 0)
    return wire.JobSpec(
        uuid=job.uuid,
        fence=job.fence,
        attempt=job.attempt,
        params=params,
        base_model_source=job.base_model_source,
        repo=job.repo_name,
        version=job.tag,
        artifacts_url=artifacts_url,
        dataset_path=job.dataset_path,
        continue_from_path=job.continue_from_path,
        resume=resume,
        revision=revision,
    )
