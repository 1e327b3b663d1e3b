"""Revisions: the immutable sets of reward functions of a job. Functions on an open transaction.

The current revision is the newest that was not refused; it is effective from the step that its process names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from rewardsmith import wire
from rewardsmith.errors import ConfigError, Conflict, NotFound
from rewardsmith.store import jobrows
from rewardsmith.store.schema import jobs, now, revisions


def add(
    connection: Connection,
    job: Row[Any],
    params: dict[str, Any],
    functions: Sequence[wire.RevisionFunction],
    created_by: str,
    *,
    note: str | None = None,
    compared_steps: int = 0,
    base: int | None = None,
) -> wire.Revision:
    """The first revision is effective from step 1, a later one when the process says so; a later one ends a pause.

    `base` is the revision that the change was made from: raises Conflict when it is no longer the present one.
    """
    if job.status in wire.TERMINAL:
        raise Conflict(f"job {job.uuid} has ended ({job.status}); its reward functions cannot change any more")
    mine = revisions.c.job_id == job.id
    newest = connection.scalar(select(func.max(revisions.c.revision)).where(mine)) or 0
    present = connection.scalar(select(func.max(revisions.c.revision)).where(mine, revisions.c.refused.is_(None)))
    if base is not None and base != present:
        raise Conflict(
            f"the reward functions of job {job.uuid} changed meanwhile: this change was made from revision {base}, the "
            f"present one is {present}. Look at it and make the change again"
        )
    row = {
        "job_id": job.id,
        "revision": newest + 1,
        "effective_step": None if newest else 1,
        "params": params,
        "functions": [function.model_dump(mode="json") for function in functions],
        "created_by": created_by,
        "created_at": now(),
        "note": note,
        "compared_steps": compared_steps,
    }
    connection.execute(insert(revisions).values(row))
    if newest:
        names = ", ".join(function.name for function in functions)
        message = f"revision {newest + 1} by {created_by}: {names}" + (f" ({note})" if note else "")
        jobrows.record(connection, job, "revision", message, step=job.step)
        resume(connection, job, f"resumed by revision {newest + 1}")
    return one(connection, job, newest + 1)


def resume(connection: Connection, job: Row[Any], message: str) -> None:
    """End a pause, if there is one."""
    if job.paused_reason is not None:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(paused_reason=None, updated_at=now()))
        jobrows.record(connection, job, "resumed", message, step=job.step)


def every(connection: Connection, job: Row[Any]) -> list[wire.Revision]:
    """Oldest first."""
    query = select(revisions).where(revisions.c.job_id == job.id).order_by(revisions.c.revision)
    found, before = list[wire.Revision](), None
    for row in connection.execute(query):
        found.append(_as_wire(row, before))
        before = row.revision if row.effective_step is not None else before
    return found


def one(connection: Connection, job: Row[Any], number: int) -> wire.Revision:
    """Raises NotFound."""
    return _as_wire(_row(connection, job, number), _before(connection, job, number))


def config_with(connection: Connection, job: Row[Any], number: int) -> dict[str, Any]:
    """The job's whole config as it was with revision `number`. Raises NotFound."""
    params: dict[str, Any] = _row(connection, job, number).params
    return params


def settle(connection: Connection, job: Row[Any], number: int, *, step: int | None, refused: str | None) -> bool:
    """Note that the process took up revision `number` from `step` on, or refused it. False when that was known."""
    row = _row(connection, job, number)
    if refused is None and step is None:
        raise ConfigError(f"revision {number}: the report names neither its first step nor why it was refused")
    if number == 1 and refused is not None:
        raise ConfigError("revision 1 cannot be refused: without it there is nothing to train; finish with an error")
    first_step = None if refused is not None else step
    if (row.effective_step, row.refused) == (first_step, refused):
        return False
    here = (revisions.c.job_id == job.id) & (revisions.c.revision == number)
    connection.execute(update(revisions).where(here).values(effective_step=first_step, refused=refused))
    return True


def in_effect_at(connection: Connection, job: Row[Any], step: int) -> tuple[wire.Revision, dict[str, Any]]:
    """The revision that scores the step after `step`, as far as is settled, and the job's config with it."""
    row = connection.execute(
        select(revisions)
        .where(revisions.c.job_id == job.id, revisions.c.effective_step <= max(step, 1))
        .order_by(revisions.c.revision.desc())
        .limit(1)
    ).one()
    return _as_wire(row, _before(connection, job, row.revision)), row.params


def truncate(connection: Connection, job: Row[Any], step: int) -> None:
    """Forget from when on revisions were effective, where that lies beyond `step`: their steps come again."""
    beyond = (revisions.c.job_id == job.id) & (revisions.c.revision > 1) & (revisions.c.effective_step > step)
    connection.execute(update(revisions).where(beyond).values(effective_step=None))


def _row(connection: Connection, job: Row[Any], number: int) -> Row[Any]:
    query = select(revisions).where(revisions.c.job_id == job.id, revisions.c.revision == number)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound(f"job {job.uuid} has no revision {number}")
    return row


def _before(connection: Connection, job: Row[Any], number: int) -> int | None:
    """The revision that was in effect before `number`."""
    earlier = (revisions.c.job_id == job.id) & (revisions.c.revision < number)
    query = select(func.max(revisions.c.revision)).where(earlier, revisions.c.effective_step.is_not(None))
    number_before: int | None = connection.scalar(query)
    return number_before


def _as_wire(row: Row[Any], replaces: int | None) -> wire.Revision:
    functions = [wire.RevisionFunction(**function) for function in row.functions]
    return wire.Revision(
        revision=row.revision,
        created_at=row.created_at,
        created_by=row.created_by,
        note=row.note,
        sha256=_digest(functions),
        replaces=replaces,
        effective_step=row.effective_step,
        refused=row.refused,
        compared_steps=row.compared_steps,
        functions=functions,
        runtime=row.params.get("rewardFns", {}).get("runtime") or {},
    )


def _digest(functions: Sequence[wire.RevisionFunction]) -> str:
    """Of what is set: a setting that a later version of this package adds does not make old sets other ones."""
    content = [function.model_dump(mode="json", exclude_defaults=True) for function in functions]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
