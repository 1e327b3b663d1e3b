"""Adapter versions: train, get, list, live config, archive, download, delete (contract 1.4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Unpack, overload

from rewardsmith import wire
from rewardsmith.client.datasets import DatasetRef
from rewardsmith.client.jobs import ConfigLike, Jobs, LogFilters
from rewardsmith.client.objects import Adapter
from rewardsmith.client.repos import RepoRef, repo_name
from rewardsmith.client.transport import Data, Transport
from rewardsmith.client.versions import AdapterRef, as_id, get_version, job_of_version, version_path
from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ConfigError, FinetuningError
from rewardsmith.wire.base import Answer


class _Versions(Answer):
    adapters: list[wire.AdapterVersion]


class Adapters:
    """`rs.adapters`. An adapter id is `<repo>/<version>` or `<repo>/<version>@<checkpoint>`."""

    def __init__(self, transport: Transport, jobs: Jobs) -> None:
        self._http = transport
        self._jobs = jobs

    def create(
        self,
        *,
        config: ConfigLike,
        dataset: DatasetRef | None = None,
        continue_from_version: AdapterRef | None = None,
        repo: RepoRef,
        compute_spec: Mapping[str, Any] | None = None,
        description: str | None = None,
        show_tensorboard: bool = False,
    ) -> Adapter:
        """Train an adapter and show the rewards until it is there. Ctrl-C stops the watching, not the job.

        Raises FinetuningError when the job ends without an adapter.
        """
        job = self._jobs.create(
            config=config,
            dataset=dataset,
            continue_from_version=continue_from_version,
            repo=repo,
            compute_spec=compute_spec,
            description=description,
            show_tensorboard=show_tensorboard,
        )
        print("This call waits until the job has ended. Interrupting it does not cancel the job.")
        self._jobs.show(job)
        adapter = self.get(job.adapter_id)
        if adapter.artifact_path is None:
            reason = adapter.finetuning_error or f"it was {adapter.status} before it saved a checkpoint"
            raise FinetuningError(f"job {job.uuid} ended without an adapter: {reason}")
        return adapter

    def get(self, adapter_id: AdapterRef, *, wait: bool = True) -> Adapter:
        """A version of a repo. While its job runs, shows the job and waits for its end, unless `wait` is off."""
        ref = as_id(adapter_id)
        version = get_version(self._http, ref)
        if wait and version.finetuning_job and version.status not in wire.TERMINAL:
            print(f"Adapter {ref} is not yet ready.")
            self._jobs.show(version.finetuning_job.uuid)
            version = get_version(self._http, ref)
        return Adapter.of(version)

    def list(self, repo: RepoRef | None = None) -> list[Adapter]:
        """Every version of a repo, or of all repos, newest first."""
        filters = {"repo": repo_name(repo) if repo is not None else None}
        answer = self._http.get("/v2/adapters", Data[_Versions], filters)
        return [Adapter.of(version) for version in answer.data.adapters]

    def get_config(self, adapter_id: AdapterRef) -> GRPOConfig:
        """The whole config of the job that made a version, to look at or to change and give to `update_config`."""
        return self._jobs.get(job_of_version(self._http, as_id(adapter_id))).params

    def update_config(self, adapter_id: AdapterRef, new_config: ConfigLike) -> None:
        """Change the reward functions while the job runs; see `finetuning.jobs.update`."""
        self._jobs.update(job_of_version(self._http, as_id(adapter_id)), new_config)

    @overload
    def reward_logs(
        self, adapter_id: AdapterRef, *, folded: Literal[False] = False, **filters: Unpack[LogFilters]
    ) -> Iterator[wire.RewardLogRow]: ...
    @overload
    def reward_logs(
        self, adapter_id: AdapterRef, *, folded: Literal[True], **filters: Unpack[LogFilters]
    ) -> wire.FoldedLogs: ...
    def reward_logs(
        self, adapter_id: AdapterRef, *, folded: bool = False, **filters: Unpack[LogFilters]
    ) -> Iterator[wire.RewardLogRow] | wire.FoldedLogs:
        """What the reward functions of the job printed and how they failed; see `finetuning.jobs.reward_logs`."""
        job = job_of_version(self._http, as_id(adapter_id))
        if folded:
            return self._jobs.reward_logs(job, folded=True, **filters)
        return self._jobs.reward_logs(job, **filters)

    def cancel(self, adapter_id: AdapterRef) -> None:
        """End the job of this version at once."""
        self._jobs.cancel(job_of_version(self._http, as_id(adapter_id)))

    def archive(self, adapter_id: AdapterRef) -> None:
        """Hide a version from `repo.versions`; it stays usable."""
        self._set_archived(adapter_id, True)

    def unarchive(self, adapter_id: AdapterRef) -> None:
        self._set_archived(adapter_id, False)

    def delete(self, adapter_id: AdapterRef) -> None:
        """Refused while the job of this version runs."""
        self._http.send("DELETE", _whole_version(adapter_id))

    def download(self, adapter_id: AdapterRef, dest: str | Path | None = None) -> Path:
        """Save a PEFT folder as a zip, by default `./<version>.zip`; a folder as `dest` gets that name inside."""
        ref = as_id(adapter_id)
        target = Path(dest).expanduser() if dest is not None else Path()
        if target.is_dir():
            target = target / f"{ref.version}.zip"
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"Downloading adapter {ref} to {target} ...")
        self._http.download(f"{version_path(ref)}/download", target)
        print("Done!")
        return target

    def estimate_finetuning_cost(self, *, config: ConfigLike, dataset: DatasetRef) -> None:
        """Print what the run would cost."""
        print(f"Estimated cost: ${self._jobs.estimate_cost(config=config, dataset=dataset):.2f}")

    def _set_archived(self, adapter_id: AdapterRef, archived: bool) -> None:
        update = wire.VersionUpdate(archived=archived)
        self._http.send("PUT", _whole_version(adapter_id), body=update.model_dump(by_alias=True))


def _whole_version(ref: AdapterRef) -> str:
    """The path of a version. Raises ConfigError for a single checkpoint of it."""
    version = as_id(ref)
    if version.checkpoint is not None:
        raise ConfigError(f"{version} is one checkpoint; this works on whole versions: {version.repo}/{version.tag}")
    return version_path(version)
