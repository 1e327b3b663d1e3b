"""Where an adapter version lives in the API, and which job made it."""

from __future__ import annotations

from rewardsmith import wire
from rewardsmith.client.objects import Adapter
from rewardsmith.client.transport import Transport, segment
from rewardsmith.errors import ConfigError, RequestError

AdapterRef = str | Adapter


def as_id(ref: AdapterRef) -> wire.AdapterId:
    """Raises ConfigError for what is no adapter id."""
    if not isinstance(ref, str | Adapter):
        raise ConfigError(f"an adapter is named <repo>/<version>, as in 'math/3', not {ref!r}")
    return wire.AdapterId.parse(ref if isinstance(ref, str) else ref.id)


def version_path(ref: wire.AdapterId) -> str:
    return f"/v2/repos/{segment(ref.repo)}/version/{ref.version}"


def get_version(transport: Transport, ref: wire.AdapterId) -> wire.AdapterVersion:
    return transport.get(version_path(ref), wire.AdapterVersion)


def job_of_version(transport: Transport, ref: wire.AdapterId) -> str:
    """The uuid of the job that made a version. Raises RequestError when none did."""
    job = get_version(transport, ref).finetuning_job
    if job is None:
        raise RequestError(f"{ref} was not made by a job, so it has no config and nothing to steer")
    return job.uuid
