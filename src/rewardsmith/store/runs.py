"""Jobs: what users, the dispatcher and job processes read and write, one transaction per method.

Every write of a job process names its fence, the number of its claim; a job that was claimed again, put back or
ended answers it with Conflict. Every change of state appends to the timeline in the same transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from rewardsmith import wire
from rewardsmith.store.artifacts import Artifacts
from rewardsmith.store.database import Database


@dataclass(frozen=True)
class Claim:
    """One attempt to run a job. `token` is the job's secret, told only here."""

    uuid: str
    fence: int
    attempt: int
    token: str


@dataclass(frozen=True)
class LiveJob:
    """A job that a process should be running. `expired`: its lease ran out by the store's clock."""

    uuid: str
    status: str
    fence: int
    attempt: int
    host: str
    handle: str | None
    lease_until: datetime
    expired: bool


class Runs:
    def __init__(self, database: Database, artifacts: Artifacts) -> None:
        self._database = database
        self._artifacts = artifacts

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
    ) -> wire.Job:
        """A queued job with its adapter version and revision 1. `params` is the whole config with its defaults.

        `repo` and `dataset` are refs, `continue_from` an adapter id. A repeated request (see `find_repeat`) gives
        the first job. Raises NotFound, ConfigError, and Conflict for a key that was used with another body.
        """
        raise NotImplementedError

    def find_repeat(self, user_id: int, idempotency_key: str | None, body_sha256: str | None) -> wire.Job | None:
        """The job an earlier request made: same key, or without a key the same body within 30 s and not yet ended.

        Raises Conflict for a key that came with another body.
        """
        raise NotImplementedError

    def get(self, uuid: str) -> wire.Job:
        """`params` has the reward functions of the newest revision that was not refused. Raises NotFound."""
        raise NotImplementedError

    def list(
        self, limit: int = 20, status: str | None = None, repo: str | None = None, after: str | None = None
    ) -> tuple[list[wire.Job], str | None]:
        """Newest first, and the cursor for `after`, None at the end."""
        raise NotImplementedError

    def timeline(self, uuid: str) -> dict[str, dict[str, str]]:
        """`{"<status>": {"startedAt": iso}}`: when the job first entered each status (contract 5.1)."""
        raise NotImplementedError

    def events(self, uuid: str, after: int = 0) -> list[wire.JobEvent]:
        """Oldest first, those with an id over `after`."""
        raise NotImplementedError

    def request(self, uuid: str, action: Literal["cancel", "stop", "resume"]) -> wire.Job:
        """Ask a job to end or go on. A queued job ends at once; asking twice is no error.

        Raises Conflict for a job that has ended otherwise, `resume` of a job that is not paused, `stop` after cancel.
        """
        raise NotImplementedError

    # ---- revisions

    def add_revision(
        self, uuid: str, params: dict[str, Any], functions: Sequence[wire.RevisionFunction], created_by: str
    ) -> wire.Revision:
        """The next revision, not yet effective; `params` is the whole config with it. A pause ends.

        Raises Conflict for a job that has ended.
        """
        raise NotImplementedError

    def revisions(self, uuid: str) -> list[wire.Revision]:
        """Oldest first."""
        raise NotImplementedError

    def revision(self, uuid: str, number: int) -> wire.Revision:
        """Raises NotFound."""
        raise NotImplementedError

    # ---- dispatcher

    def claim(self, host: str, lease_seconds: float) -> Claim | None:
        """Take the oldest queued job that is not backing off; status becomes training.

        Everything beyond its newest checkpoint with training state is truncated in the same transaction.
        """
        raise NotImplementedError

    def set_handle(self, uuid: str, fence: int, handle: str) -> None:
        raise NotImplementedError

    def live(self) -> list[LiveJob]:
        """Jobs in training or stopping, of all hosts, oldest first."""
        raise NotImplementedError

    def extend_leases(self, seconds: float) -> None:
        """Give every live job `seconds` from now, for a server that was away."""
        raise NotImplementedError

    def release(self, uuid: str, fence: int) -> wire.Job:
        """The process yielded: back to queued, not counted as a failure (or ended, when that had been asked for)."""
        raise NotImplementedError

    def fail_attempt(self, uuid: str, fence: int, reason: str, max_attempts: int) -> wire.Job:
        """The process died: back to queued with backoff, or errored with `reason`.

        Errored after `max_attempts` attempts in a row that committed no step beyond those already reached.
        """
        raise NotImplementedError

    # ---- job process: each raises Conflict for a wrong fence

    def spec(self, uuid: str, fence: int) -> wire.JobSpec:
        """`revision` is the one in effect at the resume point; a newer one follows by Control."""
        raise NotImplementedError

    def heartbeat(self, uuid: str, heartbeat: wire.Heartbeat, lease_seconds: float) -> wire.Control:
        raise NotImplementedError

    def report_step(self, uuid: str, report: wire.StepReport, lease_seconds: float) -> wire.Control:
        """Commit a step's metrics and segments. The same report again changes nothing."""
        raise NotImplementedError

    def report_checkpoint(self, uuid: str, report: wire.CheckpointReport, lease_seconds: float) -> wire.Control:
        raise NotImplementedError

    def report_event(self, uuid: str, report: wire.EventReport, lease_seconds: float) -> wire.Control:
        raise NotImplementedError

    def finish(self, uuid: str, finish: wire.Finish, lease_seconds: float) -> wire.Control:
        """End the job and serve `finish.checkpoint`. The same finish again changes nothing."""
        raise NotImplementedError
