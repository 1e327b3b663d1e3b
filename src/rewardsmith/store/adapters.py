"""The rows of versions and checkpoints behind adapter ids. Functions on an open transaction.

A version serves one of its checkpoints from the end of its job on; until then only `repo/version@checkpoint` has files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Row, Select, or_, select

from rewardsmith import wire
from rewardsmith.errors import Forbidden, NotFound
from rewardsmith.store.jobrows import best_checkpoint
from rewardsmith.store.schema import checkpoints, jobs, repos, versions

CHECKPOINT_FOLDERS = ("checkpoints", "states")  # of a job, as its process lays them out


def find_repo(connection: Connection, ref: str) -> Row[Any]:
    """By name, else by uuid. Raises NotFound."""
    rows = connection.execute(select(repos).where(or_(repos.c.name == ref, repos.c.uuid == ref))).all()
    if not rows:
        raise NotFound(f"no repo {ref!r}; make it with repos.create")
    return next((row for row in rows if row.name == ref), rows[0])


def find_version(connection: Connection, adapter: wire.AdapterId) -> Row[Any]:
    """Raises NotFound."""
    repo = find_repo(connection, adapter.repo)
    query = described().where(versions.c.repo_id == repo.id, versions.c.tag == adapter.tag)
    row = connection.execute(query).one_or_none()
    if row is None:
        tags = connection.scalars(select(versions.c.tag).where(versions.c.repo_id == repo.id).order_by("tag")).all()
        has = f"it has {', '.join(map(str, tags))}" if tags else "it has none yet"
        raise NotFound(f"repo {repo.name!r} has no version {adapter.tag}; {has}")
    return row


def load_version(connection: Connection, adapter: wire.AdapterId) -> wire.AdapterVersion:
    """Raises NotFound."""
    row = find_version(connection, adapter)
    if adapter.checkpoint is None:
        return as_wire(connection, row, row.served_checkpoint)
    version = as_wire(connection, row, adapter.checkpoint)
    if version.adapter_path is None:
        numbers = ", ".join(str(c.checkpoint) for c in version.checkpoints) or "none"
        raise NotFound(f"{row.repo}/{row.tag} has no checkpoint {adapter.checkpoint}; its checkpoints: {numbers}")
    return version


def find_adapter(connection: Connection, adapter: wire.AdapterId) -> str:
    """The folder of the adapter. Raises NotFound."""
    version = load_version(connection, adapter)
    if version.adapter_path is not None:
        return version.adapter_path
    reason = version.finetuning_job.error if version.finetuning_job else None
    latest = version.checkpoints[-1].checkpoint if version.checkpoints else None
    hint = f"; {version.repo}/{version.tag}@{latest} is its newest checkpoint" if latest is not None else ""
    raise NotFound(
        f"{version.repo}/{version.tag} has no adapter: its job is {version.status}"
        + (f" ({reason})" if reason else "")
        + hint
    )


def described() -> Select[Any]:
    return (
        select(
            versions,
            repos.c.name.label("repo"),
            jobs.c.uuid.label("job_uuid"),
            jobs.c.status,
            jobs.c.error,
        )
        .join(repos, repos.c.id == versions.c.repo_id)
        .outerjoin(jobs, jobs.c.version_id == versions.c.id)
    )


def as_wire(connection: Connection, row: Row[Any], checkpoint: int | None) -> wire.AdapterVersion:
    best = best_checkpoint(connection, row.id)
    query = select(checkpoints).where(checkpoints.c.version_id == row.id).order_by(checkpoints.c.checkpoint)
    saved = [
        wire.Checkpoint(
            checkpoint=saved.checkpoint,
            step=saved.step,
            path=saved.path,
            fingerprint=saved.fingerprint,
            eval_reward=saved.eval_reward,
            best=saved.checkpoint == best,
        )
        for saved in connection.execute(query)
    ]
    return wire.AdapterVersion(
        repo=row.repo,
        tag=row.tag,
        checkpoint=checkpoint,
        archived=row.archived,
        base_model=row.base_model,
        description=row.description,
        adapter_path=next((c.path for c in saved if c.checkpoint == checkpoint), None),
        status=row.status or "completed",
        finetuning_job=row.job_uuid and wire.JobReference(uuid=row.job_uuid, error=row.error),
        checkpoints=saved,
        created_at=row.created_at,
    )


def refuse_in_use(connection: Connection, version_ids: Iterable[int], what: str) -> None:
    """Forbidden while a job that has not ended fills one of the versions or continues it."""
    ids = list(version_ids)
    used = connection.scalars(
        select(jobs.c.uuid).where(
            or_(jobs.c.version_id.in_(ids), jobs.c.continues_id.in_(ids)), jobs.c.status.not_in(wire.TERMINAL)
        )
    ).all()
    if used:
        raise Forbidden(f"{what} is in use by job {', '.join(used)}; cancel it or wait for its end")


def files(connection: Connection, version_ids: Iterable[int]) -> list[str]:
    """The folders of all checkpoints of the versions and their training states, superseded ones too."""
    uuids = connection.scalars(select(jobs.c.uuid).where(jobs.c.version_id.in_(list(version_ids))))
    return [f"jobs/{uuid}/{folder}" for uuid in uuids for folder in CHECKPOINT_FOLDERS]
