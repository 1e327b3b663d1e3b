"""`rewardsmith adapters ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.syntax import Syntax

from rewardsmith.cli.job_config import ConfigFile, Rewards, Settings, read_config, read_rewards
from rewardsmith.cli.jobs import ContinueFrom, DatasetName, Description, RepoName
from rewardsmith.cli.output import (
    AsJson,
    age,
    connect,
    console,
    print_details,
    print_json,
    print_table,
    reward,
    status,
)
from rewardsmith.cli.revisions import weight_of
from rewardsmith.config import GRPOConfig

app = typer.Typer(
    name="adapters",
    help="Trained versions: <repo>/<version>[@<checkpoint>].",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Id = Annotated[str, typer.Argument(metavar="ADAPTER", help="Such as my-repo/1.", show_default=False)]


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
    """Train an adapter and show the rewards until it is there. Ctrl-C stops the watching, not the job."""
    try:
        adapter = connect().adapters.create(
            config=read_config(config, rewards, settings),
            dataset=dataset,
            continue_from_version=continue_from,
            repo=repo,
            description=description,
        )
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    print(f"Download it: rewardsmith adapters download {adapter.name}")


@app.command()
def get(adapter: Id, as_json: AsJson = False) -> None:
    """Show one version and its checkpoints, as they are now."""
    found = connect().adapters.get(adapter, wait=False)
    if as_json:
        return print_json(found)
    print_details(
        [
            ("adapter", found.id),
            ("status", status(found.status)),
            ("error", found.finetuning_error),
            ("base model", found.base_model),
            ("description", found.description),
            ("job", found.finetuning_job_uuid),
            ("created", age(found.created_at)),
            ("archived", "yes" if found.archived else None),
            ("files", found.artifact_path),
        ]
    )
    print()
    print_table(
        ["checkpoint", "step>", "held-out>", ""],
        (
            [f"{found.name}@{c.checkpoint}", c.step, reward(c.eval_reward), "best" if c.best else ""]
            for c in found.checkpoints
        ),
        empty="No checkpoints yet.",
    )


@app.command("list")
def list_(
    repo: Annotated[str | None, typer.Option(help="Only those of this repo.")] = None, as_json: AsJson = False
) -> None:
    """List the versions, newest first."""
    found = connect().adapters.list(repo)
    if as_json:
        return print_json(found)
    print_table(
        ["adapter", "status", "base model", "created", "description"],
        ([a.name, status(a.status), a.base_model, age(a.created_at), a.description or ""] for a in found),
        empty="No adapters yet. Train one: rewardsmith adapters create --repo NAME --dataset NAME "
        "--rewards rewards.py --set base_model=MODEL",
    )


@app.command()
def config(adapter: Id, as_json: AsJson = False) -> None:
    """Show the config of the job that made a version.

    With --json it is what --config reads.
    """
    found = connect().adapters.get_config(adapter)
    if as_json:
        return print_json(found.to_wire())
    settings = found.model_dump(mode="json", exclude={"reward_fns"}, exclude_none=True)
    print_details((name, value) for name, value in settings.items() if value not in ({}, []))
    for name, function in found.reward_fns.functions.items():
        print(f"\n# {name}, {weight_of(function)}")
        console().print(Syntax(function.source, "python", background_color="default"))


@app.command("update-config")
def update_config(
    adapter: Id,
    config: ConfigFile = None,
    rewards: Rewards = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Take this reward function out. Repeatable.")
    ] = None,
) -> None:
    """Change the reward functions while the job runs.

    --rewards adds functions or replaces those of the same name; --config gives the whole config anew.
    """
    rs = connect()
    changed: GRPOConfig = read_config(config, None, None) if config else rs.adapters.get_config(adapter)
    for argument in rewards or []:
        for name, function in read_rewards(argument):
            changed.reward_fns[name] = function
    for name in remove or []:
        if name not in changed.reward_fns:
            raise typer.BadParameter(
                f"there is no reward function {name!r}; there are: {', '.join(changed.reward_fns)}"
            )
        del changed.reward_fns[name]
    rs.adapters.update_config(adapter, changed)
    print(f"Reward functions of {adapter}: {', '.join(changed.reward_fns)}")
    print(f"From which step on they score: rewardsmith jobs revisions {adapter}")


@app.command()
def download(
    adapter: Id, dest: Annotated[Path | None, typer.Option(help="File or folder. [default: ./<version>.zip]")] = None
) -> None:
    """Save a PEFT folder as a zip."""
    connect().adapters.download(adapter, dest)


@app.command()
def cancel(adapter: Id) -> None:
    """End the job of a version at once."""
    connect().adapters.cancel(adapter)
    print(f"Asked the job of {adapter} to end.")


@app.command()
def archive(adapter: Id) -> None:
    """Hide a version from its repo; it stays usable."""
    connect().adapters.archive(adapter)
    print(f"Archived {adapter}.")


@app.command()
def unarchive(adapter: Id) -> None:
    """Show a version in its repo again."""
    connect().adapters.unarchive(adapter)
    print(f"Unarchived {adapter}.")


@app.command()
def delete(adapter: Id) -> None:
    """Delete a version whose job does not run."""
    connect().adapters.delete(adapter)
    print(f"Deleted {adapter}.")
