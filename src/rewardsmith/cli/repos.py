"""`rewardsmith repos ...`"""

from __future__ import annotations

from typing import Annotated

import typer

from rewardsmith.cli.output import AsJson, age, connect, print_details, print_json, print_table
from rewardsmith.errors import RequestError

app = typer.Typer(
    name="repos",
    help="Repositories that collect the versions of an adapter.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Name = Annotated[str, typer.Argument(help="Name of the repo.", show_default=False)]


@app.command()
def create(
    name: Name,
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    exists_ok: Annotated[bool, typer.Option("--exists-ok", help="No error when it is there already.")] = False,
) -> None:
    """Create a repo."""
    try:
        repo = connect().repos.create(name=name, description=description, exists_ok=exists_ok)
    except RequestError as error:
        if error.code != 409:
            raise
        raise RequestError(f"repo {name!r} exists; add --exists-ok to use it, or take another name", 409) from None
    print(f"Repo {repo.name} has {_count(len(repo.versions))}.")


@app.command("list")
def list_(limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50, as_json: AsJson = False) -> None:
    """List the repos, newest first."""
    found = connect().repos.list(limit=limit)
    if as_json:
        return print_json(found)
    print_table(
        ["name", "versions>", "description"],
        ([repo.name, len(repo.versions), repo.description or ""] for repo in found),
        empty="No repos yet. Create one: rewardsmith repos create NAME",
    )


@app.command()
def get(name: Name, as_json: AsJson = False) -> None:
    """Show one repo and its versions."""
    repo = connect().repos.get(name)
    if as_json:
        return print_json(repo)
    print_details([("name", repo.name), ("uuid", repo.uuid), ("description", repo.description)])
    print()
    print_table(
        ["adapter", "base model", "created", "by", ""],
        (
            [f"{repo.name}/{v.tag}", v.base_model, age(v.created_at), v.created_by, "archived" if v.archived else ""]
            for v in repo.all_versions
        ),
        empty=f"No versions yet. Train one: rewardsmith adapters create --repo {repo.name} --dataset NAME ...",
    )


@app.command()
def delete(name: Name) -> None:
    """Delete a repo with all its versions."""
    connect().repos.delete(name)
    print(f"Deleted repo {name}.")


def _count(versions: int) -> str:
    return "1 version" if versions == 1 else f"{versions} versions"
