"""`rewardsmith jobs ...`: submit, watch and steer. What a run leaves behind is read by `records`."""

from __future__ import annotations

from typing import Annotated

import typer

from rewardsmith import wire
from rewardsmith.cli import records
from rewardsmith.cli.job_config import ConfigFile, Rewards, Settings, read_config
from rewardsmith.cli.logs import logs
from rewardsmith.cli.output import AsJson, age, connect, print_details, print_json, print_table, reward, status
from rewardsmith.cli.revisions import list_ as list_revisions
from rewardsmith.client.objects import FinetuningJob
from rewardsmith.quantities import duration

app = typer.Typer(
    name="jobs",
    help="Training runs, named by uuid or by the adapter they make.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
RepoName = Annotated[str, typer.Option("--repo", help="Repo that gets the new version.", show_default=False)]
DatasetName = Annotated[str | None, typer.Option("--dataset", help="Dataset to train on.", show_default=False)]
ContinueFrom = Annotated[
    str | None, typer.Option("--continue-from", metavar="ADAPTER", help="Version to go on from.", show_default=False)
]
Description = Annotated[str | None, typer.Option("--description", help="What is new in it.", show_default=False)]


@app.command()
def create(
    repo: RepoName,
    dataset: DatasetName = None,
    config: ConfigFile = None,
    rewards: Rewards = None,
    settings: Settings = None,
    continue_from: ContinueFrom = None,
    description: Description = None,
) -> None:
    """Submit a job and come back at once."""
    job = connect().finetuning.jobs.create(
        config=read_config(config, rewards, settings),
        dataset=dataset,
        continue_from_version=continue_from,
        repo=repo,
        description=description,
    )
    print(f"Watch it: rewardsmith jobs watch {job.adapter_id}")


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    status_: Annotated[
        wire.JobStatus | None, typer.Option("--status", help="Only with this status.", show_default=False)
    ] = None,
    repo: Annotated[str | None, typer.Option(help="Only those of this repo.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs, newest first."""
    found = connect().finetuning.jobs.list(limit=limit, status=status_, repo=repo)
    if as_json:
        return print_json([_plain(job) for job in found])
    print_table(
        ["adapter", "status", "step>", "reward>", "dataset", "created", "job"],
        (
            [
                job.adapter_id,
                status("paused" if job.paused_reason else job.status),
                _progress(job),
                reward(job.total_reward),
                job.dataset,
                age(job.created_at),
                job.uuid,
            ]
            for job in found
        ),
        empty="No jobs. Submit one: rewardsmith jobs create --repo NAME --dataset NAME --rewards rewards.py "
        "--set base_model=MODEL",
    )


@app.command()
def get(job: records.JobRef, as_json: AsJson = False) -> None:
    """Show one job as it is now."""
    jobs = connect().finetuning.jobs
    found = jobs.get(job)
    if as_json:
        return print_json(_plain(found))
    left = jobs.metrics(job, series="forecast/seconds_left", after_step=found.step - 1)
    seconds = [point.value for points in left.values() for point in points]
    print_details(
        [
            ("job", found.uuid),
            ("adapter", found.adapter_id),
            ("status", status(found.status)),
            ("paused", found.paused_reason),
            ("error", found.error),
            ("step", _progress(found)),
            ("time left", duration(seconds[-1]) if seconds and found.status == "training" else None),
            ("reward", reward(found.total_reward)),
            ("revision", found.revision),
            ("attempt", found.attempt),
            ("base model", found.base_model),
            ("dataset", found.dataset),
            ("description", found.description),
            ("created", age(found.created_at)),
        ]
    )


@app.command()
def watch(job: records.JobRef) -> None:
    """Show the rewards until the job has ended. Ctrl-C stops the watching, not the job."""
    jobs = connect().finetuning.jobs
    try:
        jobs.watch(job)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(0 if jobs.get(job).status in ("completed", "stopped") else 1)


@app.command()
def cancel(job: records.JobRef) -> None:
    """End a job at once; only its saved checkpoints stay."""
    connect().finetuning.jobs.cancel(job)
    print(f"Asked {job} to end.")


@app.command()
def stop(job: records.JobRef) -> None:
    """End a job after its step and keep what it has learned."""
    connect().finetuning.jobs.stop(job)
    print(f"Asked {job} to stop after its current step.")


@app.command()
def resume(job: records.JobRef) -> None:
    """Let a paused job go on as it is."""
    connect().finetuning.jobs.resume(job)
    print(f"{job} goes on.")


records.add_to(app)
app.command()(logs)
app.command("revisions")(list_revisions)


def _progress(job: FinetuningJob) -> str:
    return f"{job.step}/{job.total_steps}" if job.total_steps else str(job.step)


def _plain(job: FinetuningJob) -> dict[str, object]:
    fields = {name: value for name, value in vars(job).items() if name not in ("stored_params", "params")}
    return {**fields, "params": job.stored_params}
