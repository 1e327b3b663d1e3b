"""Jobs: what users, the dispatcher and job processes read and write, one transaction per method.

Every write of a job process names its fence, the number of its claim; a job that was claimed again, put back or
ended answers it with Conflict. Every change of state appends to the timeline in the same transaction.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal
from uuid import uuid4

from sqlalchemy import Connection, Row, insert, select, update

from rewardsmith import wire
from rewardsmith.errors import ConfigError, Conflict
from rewardsmith.store import jobqueue, jobrows, reports, revisions, secrets
from rewardsmith.store.adapters import find_adapter, find_repo, find_version
from rewardsmith.store.artifacts import Artifacts
from rewardsmith.store.database import Database
from rewardsmith.store.datasets import dataset_path, find_dataset
from rewardsmith.store.jobqueue import Claim, LiveJob
from rewardsmith.store.schema import job_events, jobs, now, repos, users, versions
from rewardsmith.store.seal import Seal

REPEAT_WINDOW = timedelta(seconds=30)


class Runs:
    def __init__(self, database: Database, artifacts: Artifacts, seal: Seal) -> None:
        self._database = database
        self._artifacts = artifacts
        self._seal = seal

    # ---- users

    def create_job(
        self,
        *,
        user_id: int,
        repo: str,
        dataset: str,
        base_model: str,
        base_model_source: str,
        params: dict[str, Any],
        functions: Sequence[wire.RevisionFunction],
        description: str | None = None,
        continue_from: str | None = None,
        idempotency_key: str | None = None,
        body_sha256: str | None = None,
        job_secrets: Mapping[str, str] | None = None,
    ) -> wire.Job:
        """A queued job with its adapter version and revision 1. `params` is the whole config with its defaults, and
        has no secrets in it: those are `job_secrets`.

        `repo` and `dataset` are refs, `continue_from` an adapter id. A repeated request (see `find_repeat`) gives
        the first job. Raises NotFound, ConfigError, and Conflict for a key that was used with another body.
        """
        with self._database.write() as connection:
            repeated = _find_repeat(connection, user_id, idempotency_key, body_sha256)
            if repeated is not None:
                return jobrows.load(connection, repeated)
            target, source = find_repo(connection, repo), find_dataset(connection, dataset)
            tag = _next_tag(connection, target)
            continued = wire.AdapterId.parse(continue_from) if continue_from else None
            version = {
                "repo_id": target.id,
                "tag": tag,
                "base_model": base_model,
                "description": description,
                "user_id": user_id,
            }
            job = {
                "user_id": user_id,
                "repo_name": target.name,
                "tag": tag,
                "dataset_id": source.id,
                "dataset_name": source.name,
                "dataset_path": dataset_path(source.sha256),
                "base_model": base_model,
                "base_model_source": base_model_source,
                "continues_id": find_version(connection, continued).id if continued else None,
                "continue_from_path": find_adapter(connection, continued) if continued else None,
                "description": description,
                "idempotency_key": idempotency_key,
                "body_sha256": body_sha256,
            }
            uuid = _insert(connection, version, job)
            created_by = connection.scalar(select(users.c.username).where(users.c.id == user_id)) or ""
            made = jobrows.find(connection, uuid)
            revisions.add(connection, made, params, functions, created_by)
            secrets.attach(connection, self._seal, made, job_secrets or {})
            return jobrows.load(connection, uuid)

    def find_repeat(self, user_id: int, idempotency_key: str | None, body_sha256: str | None) -> wire.Job | None:
        """The job an earlier request made: same key, or without a key the same body within 30 s and not yet ended.

        Raises Conflict for a key that came with another body.
        """
        with self._database.read() as connection:
            uuid = _find_repeat(connection, user_id, idempotency_key, body_sha256)
            return None if uuid is None else jobrows.load(connection, uuid)

    def get(self, uuid: str) -> wire.Job:
        """`params` has the reward functions of the newest revision that was not refused. Raises NotFound."""
        with self._database.read() as connection:
            return jobrows.load(connection, uuid)

    def list(
        self, limit: int = 20, status: str | None = None, repo: str | None = None, after: str | None = None
    ) -> tuple[list[wire.Job], str | None]:
        """Newest first, and the cursor for `after`, None at the end."""
        query = jobrows.described().order_by(jobs.c.id.desc()).limit(limit + 1)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if repo is not None:
            query = query.where(jobs.c.repo_name == repo)
        if after is not None:
            query = query.where(jobs.c.id < _cursor(after))
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        more = len(rows) > limit
        return [jobrows.as_wire(row) for row in rows[:limit]], str(rows[limit - 1].id) if more else None

    def timeline(self, uuid: str) -> dict[str, dict[str, str]]:
        """`{"<status>": {"startedAt": iso}}`: when the job first entered each status (contract 5.1)."""
        with self._database.read() as connection:
            job = jobrows.find(connection, uuid)
            query = select(job_events).where(job_events.c.job_id == job.id, job_events.c.status.is_not(None))
            entered: dict[str, dict[str, str]] = {}
            for event in connection.execute(query.order_by(job_events.c.id)):
                entered.setdefault(event.status, {"startedAt": event.at.isoformat()})
            return entered

    def events(self, uuid: str, after: int = 0) -> builtins.list[wire.JobEvent]:
        """Oldest first, those with an id over `after`."""
        with self._database.read() as connection:
            job = jobrows.find(connection, uuid)
            query = select(job_events).where(job_events.c.job_id == job.id, job_events.c.id > after)
            return [
                wire.JobEvent(id=event.id, at=event.at, kind=event.kind, message=event.message, step=event.step)
                for event in connection.execute(query.order_by(job_events.c.id))
            ]

    def request(self, uuid: str, action: Literal["cancel", "stop", "resume"]) -> wire.Job:
        """Ask a job to end or go on. A queued job ends at once; asking twice is no error.

        The version of a canceled job serves no adapter; its checkpoints stay, as `repo/version@checkpoint`.

        Raises Conflict for a job that has ended otherwise, `resume` of a job that is not paused, `stop` after cancel.
        """
        with self._database.write() as connection:
            job = jobrows.find(connection, uuid)
            if action == "resume":
                _resume(connection, job)
            else:
                _ask_to_end(connection, job, action)
            return jobrows.load(connection, uuid)

    # ---- revisions

    def add_revision(
        self,
        uuid: str,
        params: dict[str, Any],
        functions: Sequence[wire.RevisionFunction],
        created_by: str,
        *,
        note: str | None = None,
        compared_steps: int = 0,
        base: int | None = None,
    ) -> wire.Revision:
        """The next revision, not yet effective; `params` is the whole config with it. A pause ends.

        Raises Conflict for a job that has ended, and when `base`, from which the change was made, is not the present
        revision any more.
        """
        with self._database.write() as connection:
            job = jobrows.find(connection, uuid)
            more: dict[str, Any] = {"note": note, "compared_steps": compared_steps, "base": base}
            return revisions.add(connection, job, params, functions, created_by, **more)

    def config_with(self, uuid: str, revision: int) -> dict[str, Any]:
        """The job's whole config as it was with that revision. Raises NotFound."""
        with self._database.read() as connection:
            return revisions.config_with(connection, jobrows.find(connection, uuid), revision)

    def revisions(self, uuid: str) -> builtins.list[wire.Revision]:
        """Oldest first."""
        with self._database.read() as connection:
            return revisions.every(connection, jobrows.find(connection, uuid))

    def revision(self, uuid: str, number: int) -> wire.Revision:
        """Raises NotFound."""
        with self._database.read() as connection:
            return revisions.one(connection, jobrows.find(connection, uuid), number)

    # ---- dispatcher

    def claim(self, host: str, lease_seconds: float) -> Claim | None:
        """Take the oldest queued job that is not backing off; status becomes training.

        Everything beyond its newest checkpoint with training state is truncated in the same transaction.
        """
        with self._database.write() as connection:
            return jobqueue.claim(connection, host, lease_seconds)

    def set_handle(self, uuid: str, fence: int, handle: str) -> None:
        """How the launcher calls the process of this attempt. Raises Conflict for another attempt's fence."""
        with self._database.write() as connection:
            jobqueue.set_handle(connection, uuid, fence, handle)

    def live(self) -> builtins.list[LiveJob]:
        """Jobs in training or stopping, of all hosts, oldest first."""
        with self._database.read() as connection:
            return jobqueue.live(connection)

    def extend_leases(self, seconds: float) -> None:
        """Give every live job `seconds` from now, for a server that was away."""
        with self._database.write() as connection:
            jobqueue.extend_leases(connection, seconds)

    def release(self, uuid: str, fence: int) -> wire.Job:
        """The process yielded: back to queued, not counted as a failure (or ended, when that had been asked for)."""
        with self._database.write() as connection:
            jobqueue.release(connection, uuid, fence)
            return jobrows.load(connection, uuid)

    def fail_attempt(self, uuid: str, fence: int, reason: str, max_attempts: int) -> wire.Job:
        """The process died: back to queued with backoff, or errored with `reason`.

        Errored after `max_attempts` attempts in a row that committed no step beyond those already reached.
        """
        with self._database.write() as connection:
            jobqueue.fail_attempt(connection, uuid, fence, reason, max_attempts)
            return jobrows.load(connection, uuid)

    # ---- job process: each raises Conflict for a wrong fence

    def spec(self, uuid: str, fence: int) -> wire.JobSpec:
        """`revision` is the one in effect at the resume point; a newer one follows by Control."""
        with self._database.write() as connection:
            spec = jobqueue.spec(connection, uuid, fence, self._artifacts.url)
            return spec.model_copy(update={"secrets": secrets.of_job(connection, self._seal, uuid)})

    def heartbeat(self, uuid: str, heartbeat: wire.Heartbeat, lease_seconds: float) -> wire.Control:
        with self._database.write() as connection:
            return jobrows.control(connection, reports.hold(connection, uuid, heartbeat.fence, lease_seconds))

    def report_step(self, uuid: str, report: wire.StepReport, lease_seconds: float) -> wire.Control:
        """Commit a step's metrics and segments. The same report again changes nothing."""
        with self._database.write() as connection:
            job = reports.hold(connection, uuid, report.fence, lease_seconds)
            reports.step(connection, job, report)
            return jobrows.control(connection, jobrows.find(connection, uuid))

    def report_checkpoint(self, uuid: str, report: wire.CheckpointReport, lease_seconds: float) -> wire.Control:
        with self._database.write() as connection:
            job = reports.hold(connection, uuid, report.fence, lease_seconds)
            reports.checkpoint(connection, job, report)
            return jobrows.control(connection, jobrows.find(connection, uuid))

    def report_event(self, uuid: str, report: wire.EventReport, lease_seconds: float) -> wire.Control:
        with self._database.write() as connection:
            job = reports.hold(connection, uuid, report.fence, lease_seconds)
            reports.event(connection, job, report)
            return jobrows.control(connection, jobrows.find(connection, uuid))

    def finish(self, uuid: str, finish: wire.Finish, lease_seconds: float) -> wire.Control:
        """End the job and serve `finish.checkpoint`, unless it was canceled. The same finish again changes nothing."""
        with self._database.write() as connection:
            return jobrows.control(connection, reports.finish(connection, uuid, finish, lease_seconds))


def _find_repeat(
    connection: Connection, user_id: int, idempotency_key: str | None, body_sha256: str | None
) -> str | None:
    """The uuid of the job that an earlier sending of this request made. Raises Conflict."""
    mine = select(jobs.c.uuid, jobs.c.body_sha256).where(jobs.c.user_id == user_id)
    if idempotency_key is not None:
        first = connection.execute(mine.where(jobs.c.idempotency_key == idempotency_key)).first()
        if first and body_sha256 != first.body_sha256:
            raise Conflict(f"Idempotency-Key {idempotency_key!r} came before with another job; use a new key")
        return first and first.uuid
    if body_sha256 is None:
        return None
    recent = mine.where(
        jobs.c.idempotency_key.is_(None),
        jobs.c.body_sha256 == body_sha256,
        jobs.c.created_at > now() - REPEAT_WINDOW,
        jobs.c.status.not_in(wire.TERMINAL),
    )
    first = connection.execute(recent.order_by(jobs.c.id)).first()
    return first and first.uuid


def _next_tag(connection: Connection, repo: Row[Any]) -> int:
    counted = update(repos).where(repos.c.id == repo.id).values(last_tag=repos.c.last_tag + 1)
    return int(connection.execute(counted.returning(repos.c.last_tag)).scalar_one())


def _insert(connection: Connection, version: dict[str, Any], job: dict[str, Any]) -> str:
    """A new version and its queued job; the job's uuid."""
    uuid, clock = str(uuid4()), now()
    new = insert(versions).values(archived=False, created_at=clock, **version).returning(versions.c.id)
    version_id = connection.execute(new).scalar_one()
    begin = {"status": "queued", "action": "continue", "step": 0, "furthest_step": 0}
    begin |= {"attempt": 0, "failures": 0, "fence": 0, "created_at": clock, "updated_at": clock}
    connection.execute(insert(jobs).values(uuid=uuid, version_id=version_id, **begin, **job))
    jobrows.record(connection, jobrows.find(connection, uuid), "status", "queued", status="queued")
    return uuid


def _resume(connection: Connection, job: Row[Any]) -> None:
    if job.status in wire.TERMINAL:
        raise Conflict(f"job {job.uuid} has ended ({job.status}); there is nothing to resume")
    if job.paused_reason is None:
        raise Conflict(f"job {job.uuid} is not paused")
    revisions.resume(connection, job, "resumed by request")


def _ask_to_end(connection: Connection, job: Row[Any], action: Literal["cancel", "stop"]) -> None:
    ended = "canceled" if action == "cancel" else "stopped"
    if job.status == ended or job.action == action:
        return
    if job.status in wire.TERMINAL:
        raise Conflict(f"job {job.uuid} has ended ({job.status}); it cannot be {ended}")
    if job.action == "cancel":
        raise Conflict(f"job {job.uuid} is being canceled; it cannot be stopped")
    if job.status == "queued":
        jobrows.end_without_process(connection, job, ended)
    else:
        jobrows.enter(connection, job, "stopping", f"asked to {action}", action=action)


def _cursor(after: str) -> int:
    if not after.isascii() or not after.isdigit():
        raise ConfigError(f"cursor {after!r}: pass back what `next` gave")
    return int(after)
