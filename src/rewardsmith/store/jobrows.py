"""Rows of `jobs` and their timeline, as the modules about jobs share them: find one, hold one, change one, end one.

Functions on an open transaction; `Runs` decides where it starts and ends.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, Select, func, insert, select, update

from rewardsmith import wire
from rewardsmith.errors import Conflict, NotFound
from rewardsmith.store.schema import checkpoints, job_events, jobs, now, revisions, versions

LIVE = ("training", "stopping")


def find(connection: Connection, uuid: str) -> Row[Any]:
    """Raises NotFound."""
    row = connection.execute(select(jobs).where(jobs.c.uuid == uuid)).one_or_none()
    if row is None:
        raise NotFound(f"no job {uuid!r}")
    return row


def fenced(connection: Connection, uuid: str, fence: int, **values: Any) -> Row[Any]:
    """Change a live job as the attempt that holds it, and give its new row. Raises NotFound or Conflict."""
    held = update(jobs).where(jobs.c.uuid == uuid, jobs.c.fence == fence, jobs.c.status.in_(LIVE))
    changed = connection.execute(held.values(**values) if values else held.values(fence=fence)).rowcount
    job = find(connection, uuid)
    if changed:
        return job
    if job.status in wire.TERMINAL:
        raise Conflict(f"job {uuid} has ended ({job.status}); attempt with fence {fence} must stop")
    raise Conflict(f"fence {fence} does not hold job {uuid} (status {job.status}, fence {job.fence}); stop at once")


def record(
    connection: Connection,
    job: Row[Any],
    kind: str,
    message: str,
    *,
    step: int | None = None,
    status: str | None = None,
) -> None:
    """Append one line to the job's timeline."""
    event = {"job_id": job.id, "at": now(), "kind": kind, "message": message, "step": step, "status": status}
    connection.execute(insert(job_events).values(fence=job.fence, **event))


def enter(
    connection: Connection, job: Row[Any], status: str, message: str, *, kind: str = "status", **values: Any
) -> None:
    """Change a job's status, and say so in its timeline."""
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(status=status, updated_at=now(), **values))
    record(connection, job, kind, message, step=job.step, status=status)


def end(
    connection: Connection, job: Row[Any], status: str, *, error: str | None = None, checkpoint: int | None = None
) -> None:
    """Close a job. Its version serves `checkpoint`, None for no adapter; that of a canceled job never has one."""
    if status == "canceled":
        error, checkpoint = "canceled by the user", None
    connection.execute(update(versions).where(versions.c.id == job.version_id).values(served_checkpoint=checkpoint))
    served = "without an adapter" if checkpoint is None else f"serving checkpoint {checkpoint}"
    message = f"{status}, {served}" + (f": {error}" if status == "errored" else "")
    enter(connection, job, status, message, error=error, paused_reason=None, lease_until=None)


def end_without_process(connection: Connection, job: Row[Any], status: str, error: str | None = None) -> None:
    """Close a job that has no process to choose a checkpoint: it serves the best one there is, else the newest."""
    end(connection, job, status, error=error, checkpoint=best_checkpoint(connection, job.version_id, or_newest=True))


def best_checkpoint(connection: Connection, version_id: int, *, or_newest: bool = False) -> int | None:
    """The number of the newest checkpoint that was the best when it was saved, as the present revision judges.

    A process begins a new scale with every revision: rewards of different functions cannot be compared.
    """
    newest_first = (
        select(checkpoints.c.checkpoint)
        .where(checkpoints.c.version_id == version_id)
        .order_by(checkpoints.c.checkpoint.desc())
        .limit(1)
    )
    since = (
        select(func.max(revisions.c.effective_step))
        .join(jobs, jobs.c.id == revisions.c.job_id)
        .where(jobs.c.version_id == version_id)
        .scalar_subquery()
    )
    best = connection.scalar(newest_first.where(checkpoints.c.best, checkpoints.c.step >= since))
    return connection.scalar(newest_first) if best is None and or_newest else best


def resume_point(connection: Connection, job: Row[Any]) -> wire.ResumePoint | None:
    """The newest checkpoint with training state."""
    row = connection.execute(
        select(checkpoints.c.step, checkpoints.c.checkpoint, checkpoints.c.state_path)
        .where(checkpoints.c.version_id == job.version_id, checkpoints.c.state_path.is_not(None))
        .order_by(checkpoints.c.checkpoint.desc())
        .limit(1)
    ).one_or_none()
    return row and wire.ResumePoint(step=row.step, checkpoint=row.checkpoint, state_path=row.state_path)


def _current_revision() -> Any:
    """The number of a job's newest revision that was not refused."""
    return (
        select(func.max(revisions.c.revision))
        .where(revisions.c.job_id == jobs.c.id, revisions.c.refused.is_(None))
        .correlate(jobs)
        .scalar_subquery()
    )


def control(connection: Connection, job: Row[Any]) -> wire.Control:
    """What the job's process is told."""
    revision = connection.scalar(select(_current_revision()).select_from(jobs).where(jobs.c.id == job.id))
    return wire.Control(action=job.action, paused=job.paused_reason is not None, revision=revision)


def described() -> Select[Any]:
    """A query of jobs with their current revision, for `as_wire`."""
    here = (revisions.c.job_id == jobs.c.id) & (revisions.c.revision == _current_revision())
    return select(jobs, revisions.c.revision, revisions.c.params).join(revisions, here)


def as_wire(row: Row[Any]) -> wire.Job:
    return wire.Job(
        uuid=row.uuid,
        base_model=row.base_model,
        dataset_name=row.dataset_name,
        description=row.description,
        target_repo_name=row.repo_name,
        target_version_tag=row.tag,
        status=row.status,
        params=row.params,
        error=row.error,
        paused_reason=row.paused_reason,
        step=row.step,
        total_steps=row.total_steps,
        steps_per_epoch=row.steps_per_epoch,
        attempt=row.attempt,
        revision=row.revision,
        total_reward=row.total_reward,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def load(connection: Connection, uuid: str) -> wire.Job:
    """Raises NotFound."""
    return as_wire(connection.execute(described().where(jobs.c.id == find(connection, uuid).id)).one())
