"""What the SDK hands out where a wire model does not fit: Dataset, Adapter, FinetuningJob (contract 1.3 to 1.5).

Attribute names are the original's, with ours beside them. The objects are snapshots: they do not change and fetch
nothing. Repos and their versions, revisions, events, metric points, completions and log rows are wire models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Self

from rewardsmith import wire
from rewardsmith.config import GRPOConfig


class Dataset(wire.Dataset):
    """A dataset file on the server."""

    @property
    def connection_type(self) -> str:
        return self.connection.type

    @property
    def connection_name(self) -> str:
        return self.connection.name


@dataclass(frozen=True)
class Adapter:
    """One version of a repo, at its best or a chosen checkpoint. `artifact_path` is None until there is an adapter."""

    repo: str
    tag: int
    checkpoint: int | None
    archived: bool
    base_model: str | None
    description: str | None
    artifact_path: str | None
    finetuning_error: str | None
    finetuning_job_uuid: str | None
    status: str
    checkpoints: list[wire.Checkpoint] = field(repr=False)
    created_at: datetime | None

    @classmethod
    def of(cls, version: wire.AdapterVersion) -> Self:
        job = version.finetuning_job
        return cls(
            repo=version.repo,
            tag=version.tag,
            checkpoint=version.checkpoint,
            archived=version.archived,
            base_model=version.base_model,
            description=version.description,
            artifact_path=version.adapter_path,
            finetuning_error=job.error if job else None,
            finetuning_job_uuid=job.uuid if job else None,
            status=version.status,
            checkpoints=version.checkpoints,
            created_at=version.created_at,
        )

    @property
    def name(self) -> str:
        return f"{self.repo}/{self.tag}"

    @property
    def id(self) -> str:
        """What every call that takes an adapter id accepts."""
        return str(wire.AdapterId(self.repo, self.tag, self.checkpoint))


@dataclass(frozen=True)
class FinetuningJob:
    """A job as it was when asked for. `error` is the sentence that ended it, `step` the last one it reported."""

    uuid: str
    base_model: str
    dataset: str
    description: str | None
    target_repo: str
    target_version_tag: int
    accelerator: str
    status: wire.JobStatus
    error: str | None
    paused_reason: str | None
    step: int
    total_steps: int | None
    attempt: int
    revision: int
    total_reward: float | None
    created_at: datetime | None
    updated_at: datetime | None
    stored_params: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, job: wire.Job) -> Self:
        return cls(
            uuid=job.uuid,
            base_model=job.base_model,
            dataset=job.dataset_name,
            description=job.description,
            target_repo=job.target_repo_name,
            target_version_tag=job.target_version_tag,
            accelerator=job.accelerator.id,
            status=job.status,
            error=job.error,
            paused_reason=job.paused_reason,
            step=job.step,
            total_steps=job.total_steps,
            attempt=job.attempt,
            revision=job.revision,
            total_reward=job.total_reward,
            created_at=job.created_at,
            updated_at=job.updated_at,
            stored_params=job.params,
        )

    @cached_property
    def params(self) -> GRPOConfig:
        """The whole config of the run, with every default filled in."""
        return GRPOConfig(**self.stored_params)

    @property
    def adapter_id(self) -> str:
        """The adapter version that the job fills."""
        return f"{self.target_repo}/{self.target_version_tag}"
