"""The journal: what a job process reports to the server, and what it is told in reply. Data only.

Every report carries the fence of the attempt that sends it; a report with an older fence is refused.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rewardsmith.wire.base import Answer, Request
from rewardsmith.wire.revisions import Revision

# In the environment of a job process and of all it starts, reward workers too: `<uuid>:<attempt>`.
JOB_MARKER = "REWARDSMITH_JOB"


class ResumePoint(Answer):
    """Where to take the run up again: the training state under `state_path` was saved after `step`."""

    step: int
    checkpoint: int
    state_path: str


class JobSpec(Answer):
    """All a job process needs to run one attempt. `params` is complete but for the `secrets`; URLs are for obstore.

    `private_endpoints`, `host:port` each, are those of private networks that the administrator lets functions use.
    """

    uuid: str
    fence: int
    attempt: int
    params: dict[str, Any]
    base_model_source: str
    repo: str
    version: int
    artifacts_url: str
    dataset_path: str
    continue_from_path: str | None = None
    resume: ResumePoint | None = None
    revision: Revision
    secrets: dict[str, str] = Field(default_factory=dict, repr=False)
    private_endpoints: list[str] = Field(default_factory=list)


class Segment(Request):
    """One immutable Parquet file of a step. Committed when its manifest row exists."""

    family: Literal["completions", "reward_logs"]
    phase: Literal["train", "eval"]
    step: int
    rows: int
    bytes: int
    path: str
    sha256: str


class StepReport(Request):
    """Idempotent on (job, step, fence). `metrics` has the names of design section 7."""

    fence: int
    step: int
    epoch: float
    total_steps: int
    steps_per_epoch: int
    revision: int
    metrics: dict[str, float]
    segments: list[Segment] = Field(default_factory=list)


class CheckpointReport(Request):
    """The adapter under `path` and, for the newest ones, the training state under `state_path` are complete on disk."""

    fence: int
    checkpoint: int
    step: int
    path: str
    state_path: str
    fingerprint: str
    eval_reward: float | None = None
    best: bool = False


class EventReport(Request):
    fence: int
    kind: Literal["paused", "resumed", "revision", "warning", "info"]
    message: str
    step: int | None = None
    revision: int | None = None
    refused: str | None = None


class Heartbeat(Request):
    fence: int


class Finish(Request):
    """The end of a run. `checkpoint` is the one the version serves; None when there is no adapter."""

    fence: int
    status: Literal["completed", "stopped", "canceled", "errored"]
    error: str | None = None
    checkpoint: int | None = None


class Control(Answer):
    """What the server answers to every report. `action`: go on, finish with what there is, or end at once."""

    action: Literal["continue", "stop", "cancel"] = "continue"
    paused: bool = False
    revision: int = 1
