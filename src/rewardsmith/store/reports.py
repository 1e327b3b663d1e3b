"""What a job process reports: steps, checkpoints, events, its end. Functions on an open write transaction.

Each begins with the fence, which also extends the lease; a report that was committed before changes nothing, so that
a process may send one again whose answer it did not get.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from rewardsmith import wire
from rewardsmith.errors import ConfigError
from rewardsmith.store import jobrows, revisions
from rewardsmith.store.artifacts import checked
from rewardsmith.store.schema import checkpoints, job_events, jobs, metrics, now, segments, steps


def hold(connection: Connection, uuid: str, fence: int, lease_seconds: float) -> Row[Any]:
    """The job, with its lease extended. Raises NotFound, or Conflict when `fence` does not hold it."""
    return jobrows.fenced(connection, uuid, fence, lease_until=now() + timedelta(seconds=lease_seconds))


def step(connection: Connection, job: Row[Any], report: wire.StepReport) -> None:
    """Commit metrics and segments. Raises ConfigError for a metric that is no number and for foreign segments."""
    for name, value in report.metrics.items():
        if not math.isfinite(value):
            raise ConfigError(f"metric {name!r} of step {report.step} is {value}; leave out what is not a number")
    for segment in report.segments:
        own_path(job, segment.path)
        if segment.step != report.step:
            raise ConfigError(f"segment {segment.path!r} is of step {segment.step}, its report of step {report.step}")
    fence = connection.scalar(select(steps.c.fence).where(steps.c.job_id == job.id, steps.c.step == report.step))
    if fence == report.fence:
        return
    for table in (steps, metrics, segments):  # an earlier attempt's, where there was nothing to resume from
        connection.execute(delete(table).where(table.c.job_id == job.id, table.c.step == report.step))
    row = {"job_id": job.id, "step": report.step, "fence": report.fence, "at": now()}
    connection.execute(insert(steps).values(row | {"epoch": report.epoch, "revision": report.revision}))
    values = [{"job_id": job.id, "step": report.step, "series": s, "value": v} for s, v in report.metrics.items()]
    if values:
        connection.execute(insert(metrics), values)
    for segment in report.segments:
        connection.execute(insert(segments).values(job_id=job.id, **segment.model_dump()))
    if report.step >= job.step:
        _advance(connection, job, report)


def _advance(connection: Connection, job: Row[Any], report: wire.StepReport) -> None:
    values: dict[str, Any] = {
        "step": report.step,
        "total_steps": report.total_steps,
        "steps_per_epoch": report.steps_per_epoch,
        "total_reward": report.metrics.get("total_reward", job.total_reward),
        "updated_at": now(),
    }
    if report.step > job.furthest_step:
        values |= {"furthest_step": report.step, "failures": 0}
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))


def checkpoint(connection: Connection, job: Row[Any], report: wire.CheckpointReport) -> None:
    """A later save under the same number takes the place of one that was made between two regular ones."""
    own_path(job, report.path)
    if report.state_path:
        own_path(job, report.state_path)
    here = (checkpoints.c.version_id == job.version_id) & (checkpoints.c.checkpoint == report.checkpoint)
    known = connection.execute(select(checkpoints).where(here)).one_or_none()
    if known is not None:
        if (known.step, known.fingerprint) == (report.step, report.fingerprint):
            return
        if known.step >= report.step:
            raise ConfigError(
                f"checkpoint {report.checkpoint} of job {job.uuid} is of step {known.step} and has other weights"
            )
        connection.execute(delete(checkpoints).where(here))
    row = report.model_dump(exclude={"fence"}) | {"state_path": report.state_path or None}
    connection.execute(insert(checkpoints).values(version_id=job.version_id, created_at=now(), **row))
    reward = "" if report.eval_reward is None else f", held-out reward {report.eval_reward:.4g}"
    message = f"checkpoint {report.checkpoint}{reward}{', the best so far' if report.best else ''}"
    jobrows.record(connection, job, "checkpoint", message, step=report.step)


def event(connection: Connection, job: Row[Any], report: wire.EventReport) -> None:
    """Tell it in the timeline, with what follows from it. Raises ConfigError for a revision event that says nothing."""
    if report.kind == "paused":
        if job.paused_reason == report.message:
            return
        connection.execute(
            update(jobs).where(jobs.c.id == job.id).values(paused_reason=report.message, updated_at=now())
        )
    elif report.kind == "resumed":
        revisions.resume(connection, job, report.message)
        return
    elif report.kind == "revision":
        if report.revision is None:
            raise ConfigError("an event of kind 'revision' has to name the revision")
        news = revisions.settle(connection, job, report.revision, step=report.step, refused=report.refused)
        if not news:
            return
    elif _told_before(connection, job, report):
        return
    jobrows.record(connection, job, report.kind, report.message, step=report.step)


def _told_before(connection: Connection, job: Row[Any], report: wire.EventReport) -> bool:
    same = select(job_events.c.id).where(
        job_events.c.job_id == job.id,
        job_events.c.fence == report.fence,
        job_events.c.kind == report.kind,
        job_events.c.message == report.message,
        job_events.c.step.is_not_distinct_from(report.step),
    )
    return connection.execute(same).first() is not None


def finish(connection: Connection, uuid: str, report: wire.Finish, lease_seconds: float) -> Row[Any]:
    """The job after its end."""
    job = jobrows.find(connection, uuid)
    if (job.fence, job.status) == (report.fence, report.status):
        return job
    job = hold(connection, uuid, report.fence, lease_seconds)
    if report.checkpoint is not None:
        mine = checkpoints.c.version_id == job.version_id
        query = select(checkpoints).where(mine, checkpoints.c.checkpoint == report.checkpoint)
        if connection.execute(query).first() is None:
            raise ConfigError(f"job {uuid} cannot serve checkpoint {report.checkpoint}: it was not reported")
    if report.status == "errored" and not report.error:
        raise ConfigError("an errored job says why: set error")
    jobrows.end(connection, job, report.status, error=report.error, checkpoint=report.checkpoint)
    return jobrows.find(connection, uuid)


def own_path(job: Row[Any], path: str) -> None:
    """A job names files of its own folders only: they are read, and deleted with its version."""
    if job.uuid not in checked(path).split("/")[:-1]:
        raise ConfigError(f"path {path!r} is not in a folder of job {job.uuid}")
