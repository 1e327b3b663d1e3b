"""`rewardsmith datasets ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewardsmith.cli.output import AsJson, age, connect, print_details, print_json, print_table
from rewardsmith.client.objects import Dataset

app = typer.Typer(name="datasets", help="Files of prompts to train on.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(help="Name of the dataset.", show_default=False)]


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(help="A jsonl, json, csv or parquet file.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="[default: the file's name without its suffix]")] = None,
) -> None:
    """Check and store a file of rows with a `prompt` column."""
    dataset = connect().datasets.from_file(file, name=name)
    print(f"Uploaded dataset {dataset.name}: {dataset.rows} rows, columns {', '.join(dataset.columns)}")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the datasets, newest first."""
    found = connect().datasets.list()
    if as_json:
        return print_json(found)
    print_table(
        ["name", "rows>", "columns", "uploaded"],
        ([d.name, d.rows, ", ".join(d.columns), age(d.created_at)] for d in found),
        empty="No datasets yet. Upload one: rewardsmith datasets upload rows.jsonl",
    )


@app.command()
def get(name: Name, as_json: AsJson = False) -> None:
    """Show one dataset."""
    dataset = connect().datasets.get(name)
    if as_json:
        return print_json(dataset)
    print_details(
        [
            ("name", dataset.name),
            ("uuid", dataset.uuid),
            ("status", dataset.status),
            ("error", dataset.last_error),
            ("rows", dataset.rows),
            ("columns", ", ".join(dataset.columns)),
            ("uploaded", age(dataset.created_at)),
            ("prompts", _lengths(dataset)),
        ]
    )


@app.command()
def download(
    name: Name,
    dest: Annotated[Path, typer.Option(help="A folder, or a file name without its suffix.")] = Path("."),
) -> None:
    """Save the rows to a file."""
    print(f"Saved {connect().datasets.download(name, dest=dest)}")


@app.command()
def delete(name: Name) -> None:
    """Delete a dataset that no running job uses."""
    connect().datasets.delete(name)
    print(f"Deleted dataset {name}.")


def _lengths(dataset: Dataset) -> str:
    return ", ".join(f"{bucket.rows} of {bucket.low}-{bucket.high} characters" for bucket in dataset.prompt_lengths)
