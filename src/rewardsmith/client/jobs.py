"""Jobs: create, watch, steer, and everything a run leaves behind (contract 1.5 and our own).

A job may be named by uuid, by object, by `{"uuid": ...}`, or by the adapter id it fills (`my-repo/1`). What is printed
while watching is drawn by `client.view` from the events of `client.stream`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, overload
from uuid import uuid4

from rewardsmith import wire
from rewardsmith.client import stream, view
from rewardsmith.client.datasets import DatasetRef, dataset_name
from rewardsmith.client.objects import FinetuningJob
from rewardsmith.client.repos import RepoRef, repo_name
from rewardsmith.client.transport import Data, Params, Transport, segment
from rewardsmith.client.versions import AdapterRef, as_id, job_of_version
from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ConfigError
from rewardsmith.wire.base import Answer

JobRef = str | FinetuningJob | Mapping[str, Any]
ConfigLike = GRPOConfig | Mapping[str, Any]
JOBS = "/v2/finetuning/jobs"
MOST_FOLDS = 500  # that are told apart
Row = TypeVar("Row", wire.CompletionRow, wire.RewardLogRow)


class LogFilters(TypedDict, total=False):
    """Which calls of a reward log to give; see `Jobs.reward_logs`."""

    function: str | None
    revision: int | None
    step: int | None
    from_step: int | None
    to_step: int | None
    epoch: int | None
    phase: str | None
    outcome: str | None
    text: str | None
    every: bool


class _Jobs(Answer):
    jobs: list[wire.Job]


class _Metrics(Answer):
    series: dict[str, list[wire.MetricPoint]]


class Jobs:
    """`rs.finetuning.jobs`."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport

    def create(
        self,
        *,
        config: ConfigLike,
        dataset: DatasetRef | None = None,
        continue_from_version: AdapterRef | None = None,
        repo: RepoRef,
        compute_spec: Mapping[str, Any] | None = None,
        description: str | None = None,
        watch: bool = False,
        show_tensorboard: bool = False,
    ) -> FinetuningJob:
        """Submit a job and come back at once, or, with `watch`, when it has ended.

        Raises ConfigError or RewardSourceError before anything is sent, RequestError when the server refuses.
        """
        config = as_config(config)
        parent = as_id(continue_from_version) if continue_from_version is not None else None
        if config.epochs is not None and config.train_steps is not None:
            _warn("both epochs and train_steps are set; epochs is ignored")
        if show_tensorboard:
            _warn("there is no TensorBoard here; finetuning.jobs.metrics(...) gives every series")
        request = wire.JobRequest(
            params=config.to_wire(),
            dataset=dataset_name(dataset) if dataset is not None else None,
            continue_from_version=str(parent) if parent else None,
            repo=repo_name(repo),
            description=description,
            compute_spec=dict(compute_spec) if compute_spec is not None else None,
        )
        # One key for all tries of this call: an answer lost on the way does not start a second job.
        answer = self._http.call("POST", JOBS, wire.Job, body=request.model_dump(by_alias=True), key=str(uuid4()))
        job = FinetuningJob.of(answer)
        view.confirm(job, source=str(parent) if parent else "base")
        if watch:
            self.watch(job)
            return self.get(job)
        return job

    def get(self, job: JobRef) -> FinetuningJob:
        return FinetuningJob.of(self._http.get(self.path(job), wire.Job))

    def watch(self, job_ref: JobRef, show_tensorboard: bool = False) -> None:
        """Show the job until it has ended. Ctrl-C stops the watching, not the job, and is raised again."""
        ended = self.show(job_ref)
        if ended is not None and ended.error:
            print(ended.error)

    def show(self, job_ref: JobRef) -> wire.Job | None:
        """Draw a job until it has ended and return it; None when there was nothing to watch."""
        job = self.get(job_ref)
        if job.status in wire.TERMINAL:
            print(f"Job {job.uuid} is already {job.status}. Nothing to watch.")
            return None
        return view.watch(self.stream(job), job)

    def stream(self, job_ref: JobRef) -> Iterator[stream.Event]:
        """What happens in the job, as events, until it has ended: for a view of your own."""
        return stream.follow(self._http, self._uuid(job_ref))

    def cancel(self, job: JobRef) -> None:
        """End the job at once; of its adapter only the checkpoints that were saved are left."""
        self._http.send("POST", f"{self.path(job)}/cancel")

    def stop(self, job: JobRef) -> None:
        """End the job after its current step and keep its best checkpoint as the adapter."""
        self._http.send("POST", f"{self.path(job)}/stop")

    def resume(self, job: JobRef) -> None:
        """Let a paused job go on as it is."""
        self._http.send("POST", f"{self.path(job)}/resume")

    def update(self, job_ref: JobRef, new_config: ConfigLike) -> None:
        """Change the reward functions of a running job; the new set scores from one of the next steps on.

        Raises RequestError when anything else differs from the job's config, or the new set does not load.
        """
        self._http.send("PUT", f"{self.path(job_ref)}/config", body=as_config(new_config).to_wire())

    def estimate_cost(self, *, config: ConfigLike, dataset: DatasetRef) -> float:
        """What the run costs in dollars: nothing, where the machine is yours."""
        config = as_config(config)
        body = {
            "baseModel": config.base_model,
            "datasetName": dataset_name(dataset),
            "taskType": config.task,
            "epochs": config.epochs,
            "trainSteps": config.train_steps,
            "numGenerations": config.num_generations,
            "maxTokens": config.sampling_params.max_tokens,
        }
        return self._http.call("GET", f"{JOBS}/cost-estimate", wire.CostEstimate, body=body).estimated_cost

    def metrics(
        self, job: JobRef, series: str | None = None, after_step: int | None = None
    ) -> dict[str, list[wire.MetricPoint]]:
        """Every series by name, or one of them, as points in order of steps."""
        filters = {"series": series, "after_step": after_step}
        return self._http.get(f"{self.path(job)}/metrics", _Metrics, filters).series

    def completions(
        self,
        job: JobRef,
        *,
        step: int | None = None,
        phase: str | None = None,
        row: int | None = None,
        function: str | None = None,
        outcome: str | None = None,
        min_score: float | None = None,
        max_score: float | None = None,
        text: str | None = None,
        order: str = "newest",
    ) -> Iterator[wire.CompletionRow]:
        """The stored completions that fit every filter, fetched page by page as they are read.

        `phase` is "train" or "eval"; `order` is "newest" or "oldest"; `min_score` and `max_score` are about `function`,
        or about the total when there is none; `text` is searched for in prompts and completions.
        """
        filters = {
            "step": step,
            "phase": phase,
            "row": row,
            "function": function,
            "outcome": outcome,
            "min_score": min_score,
            "max_score": max_score,
            "text": text,
            "order": order,
        }
        return self._pages(f"{self.path(job)}/completions", wire.CompletionRow, filters)

    @overload
    def reward_logs(
        self, job: JobRef, *, folded: Literal[False] = False, **filters: Unpack[LogFilters]
    ) -> Iterator[wire.RewardLogRow]: ...
    @overload
    def reward_logs(self, job: JobRef, *, folded: Literal[True], **filters: Unpack[LogFilters]) -> wire.FoldedLogs: ...
    def reward_logs(
        self, job: JobRef, *, folded: bool = False, **filters: Unpack[LogFilters]
    ) -> Iterator[wire.RewardLogRow] | wire.FoldedLogs:
        """Calls of reward functions that printed something or failed, newest steps first, with `every` all calls.

        Filters: `function`, `revision`, `step`, `from_step`, `to_step` (included), `epoch` (a pass over the rows, from
        1), `phase` ("train" or "eval"), `outcome`, `text` (in prints and errors). Rows are fetched page by page as
        they are read. `folded=True` makes calls that said the same but for numbers one entry with a count and an
        example, the most frequent first.
        """
        unknown = filters.keys() - LogFilters.__annotations__.keys()
        if unknown:
            known = ", ".join(LogFilters.__annotations__)
            raise ConfigError(f"reward logs have no filter {', '.join(sorted(unknown))!r}; they have {known}")
        path, query = f"{self.path(job)}/reward-logs", cast(Params, filters)
        if not folded:
            return self._pages(path, wire.RewardLogRow, query)
        return _all_folds(self._http, f"{path}/folded", query)

    def events(self, job: JobRef) -> list[wire.JobEvent]:
        """The timeline of the job, oldest first."""
        return self._http.get(f"{self.path(job)}/events", list[wire.JobEvent])

    def revisions(self, job: JobRef) -> list[wire.Revision]:
        """Every set of reward functions the job has had, oldest first."""
        return self._http.get(f"{self.path(job)}/revisions", list[wire.Revision])

    def log(self, job: JobRef, attempt: int | None = None) -> str:
        """The end of what the job's process itself wrote, by default in its last attempt."""
        path = f"{self.path(job)}/log"
        return self._http.send("GET", path, params={"attempt": attempt}).text

    def list(
        self, *, limit: int = 50, status: wire.JobStatus | None = None, repo: RepoRef | None = None
    ) -> list[FinetuningJob]:
        """The newest jobs first."""
        jobs: list[FinetuningJob] = []
        repo_filter = repo_name(repo) if repo is not None else None
        after: str | None = None
        while len(jobs) < limit:
            filters = {"limit": limit - len(jobs), "status": status, "repo": repo_filter, "after": after}
            page = self._http.get(JOBS, Data[_Jobs], filters)
            jobs += [FinetuningJob.of(job) for job in page.data.jobs]
            after = page.next
            if after is None:
                break
        return jobs

    def _pages(self, path: str, row: type[Row], filters: Mapping[str, str | int | float | None]) -> Iterator[Row]:
        after: str | None = None
        while True:
            page = self._http.get(path, wire.Page, {**filters, "after": after})
            yield from map(row.model_validate, page.data)
            after = page.next
            if after is None:
                return

    def path(self, ref: JobRef) -> str:
        """Where the job is in the API."""
        return f"{JOBS}/{segment(self._uuid(ref))}"

    def _uuid(self, ref: JobRef) -> str:
        if isinstance(ref, FinetuningJob):
            return ref.uuid
        if isinstance(ref, Mapping):
            return str(ref["uuid"])
        return job_of_version(self._http, wire.AdapterId.parse(ref)) if "/" in ref else ref


def _all_folds(transport: Transport, path: str, filters: Params) -> wire.FoldedLogs:
    """All pages put together: each has folded a part of the log, the newest first."""
    folds: dict[tuple[str, int, str, str], wire.FoldedLog] = {}
    others, after = 0, None
    while True:
        page = transport.get(path, wire.FoldedLogs, {**filters, "after": after, "limit": MOST_FOLDS})
        for fold in page.data:
            key = (fold.function, fold.revision, fold.outcome, fold.gist)
            if newer := folds.get(key):
                both = {"count": newer.count + fold.count, "first_step": min(newer.first_step, fold.first_step)}
                fold = newer.model_copy(update=both)
            folds[key] = fold
        others, after = others + page.others, page.next
        if after is None:
            most = sorted(folds.values(), key=lambda fold: fold.count, reverse=True)
            return wire.FoldedLogs(data=most, others=others)


def as_config(config: ConfigLike) -> GRPOConfig:
    """A base model that is a folder relative to this process or its user is named by its absolute path.

    Raises ConfigError for anything that is no GRPO config.
    """
    if isinstance(config, Mapping):
        config = GRPOConfig(**config)
    if not isinstance(config, GRPOConfig):
        raise ConfigError(f"config is a GRPOConfig or a dict, not a {type(config).__name__}")
    model = config.base_model or ""
    if model.partition("/")[0] in (".", "..", "~") and (folder := Path(model).expanduser()).is_dir():
        return config.model_copy(update={"base_model": str(folder.resolve())})
    return config


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
