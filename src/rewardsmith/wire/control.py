"""Requests and answers of the control plane, shared by client and server. Data only.

They have the original's shapes (contract 5.1), with our fields beside them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict, Field

from rewardsmith.wire.base import Answer, Request

JobStatus = Literal["queued", "training", "stopping", "completed", "canceled", "errored", "stopped"]
TERMINAL: frozenset[str] = frozenset({"completed", "canceled", "errored", "stopped"})
DEFAULT_CONNECTION = "file_uploads"


class Subscription(Answer):
    id: int = 1
    tier: str = "enterprise"
    is_trial: bool = False
    expiration: str = "2099-01-01T00:00:00Z"
    days_remaining_in_plan: int = 9999
    active: bool = True


class Tenant(Answer):
    name: str = "local"
    short_code: str = "local"
    subscription: Subscription = Subscription()


class CurrentUser(Answer):
    id: int
    username: str
    uuid: str
    comment: str = ""
    tenant: Tenant = Tenant()


class RepoRequest(Request):
    name: str
    description: str | None = None
    exists_ok: bool = False


class VersionSummary(Answer):
    tag: int
    created_at: datetime
    created_by: str
    base_model: str | None
    archived: bool = False


class Repo(Answer):
    uuid: str
    name: str
    description: str | None = None
    all_versions: list[VersionSummary] = Field(default_factory=list, alias="versions")

    @property
    def versions(self) -> list[VersionSummary]:
        """Versions that are not archived (contract 1.2)."""
        return [version for version in self.all_versions if not version.archived]


class JobReference(Answer):
    uuid: str
    error: str | None = None


class Checkpoint(Answer):
    """A published adapter of a run. `checkpoint` counts from 1 in a version; `eval_reward` is the held-out total."""

    checkpoint: int
    step: int
    path: str
    fingerprint: str
    eval_reward: float | None = None
    best: bool = False


class AdapterVersion(Answer):
    repo: str
    tag: int
    checkpoint: int | None = None
    archived: bool = False
    base_model: str | None = None
    description: str | None = None
    adapter_path: str | None = None
    status: str = "completed"
    finetuning_job: JobReference | None = None
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    created_at: datetime | None = None


class VersionUpdate(Request):
    archived: bool


class UploadRequest(Request):
    file_name: str
    mime_type: str | None = None
    region: str | None = None


class UploadTicket(Answer):
    """`required_headers` stays empty: the stock client walks it in a wrong way (contract 5.1)."""

    presigned_url: str
    upload_token: str
    required_headers: dict[str, str] = Field(default_factory=dict)


class UploadComplete(Request):
    name: str
    upload_token: str


class Connection(Answer):
    type: str = "file"
    name: str = DEFAULT_CONNECTION


class LengthBucket(Answer):
    """Rows whose prompt has `low` to `high` characters, both included."""

    low: int
    high: int
    rows: int


class Dataset(Answer):
    uuid: str
    id: int
    name: str
    connection: Connection = Connection()
    last_error: str | None = None
    status: str = "connected"
    rows: int = 0
    columns: list[str] = Field(default_factory=list)
    prompt_lengths: list[LengthBucket] = Field(default_factory=list)
    created_at: datetime | None = None


class DownloadLink(Answer):
    url: str
    file_extension: str


class JobRequest(Request):
    """`params` is a config as its `to_wire()` gives it."""

    params: dict[str, Any]
    dataset: str | None = None
    continue_from_version: str | None = None
    repo: str
    description: str | None = None
    compute_spec: dict[str, Any] | None = None
    show_tensorboard: bool | None = None


class Accelerator(Answer):
    id: str = "cpu"


class Job(Answer):
    """`params` is the whole config with every default filled in. `error` is the sentence that ended the job."""

    uuid: str
    base_model: str
    dataset_name: str
    description: str | None = None
    target_repo_name: str
    target_version_tag: int
    accelerator: Accelerator = Accelerator()
    status: JobStatus
    params: dict[str, Any]
    error: str | None = None
    paused_reason: str | None = None
    step: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    attempt: int = 0
    revision: int = 1
    total_reward: float | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class CostEstimate(Answer):
    estimated_cost: float = 0


class JobEvent(Answer):
    """One line of a job's timeline. `kind`: status, revision, checkpoint, paused, resumed, restarted, warning, info."""

    id: int
    at: datetime
    kind: str
    message: str
    step: int | None = None


class StreamData(Answer):
    """The changing part of a metrics message (contract 1.5); field names travel in snake_case.

    `epoch` counts whole passes: the stock SDK drops a message in which it is not an integer.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    steps: int
    epoch: int | None = None
    learning_rate: float | None = None
    train_metrics_loss: float | None = None
    total_tokens_used: int | None = None
    checkpoint_number: int | None = None
    grpo_train_rewards: dict[str, float] | None = None


class StreamMeta(Answer):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    is_completed: bool
    model_uuid: str
    run_id: str
    steps: int
    steps_per_epoch: int
    total_steps: int


class StreamMessage(Answer):
    data: StreamData
    meta: StreamMeta
