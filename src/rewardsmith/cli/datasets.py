"""`rewardsmith datasets ...`"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Annotated

import typer

from rewardsmith.cli.output import AsJson, age, connect, print_details, print_json, print_table
from rewardsmith.client.objects import Dataset
from rewardsmith.client.view import sparkline

app = typer.Typer(name="datasets", help="Files of prompts to train on.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(help="Name of the dataset.", show_default=False)]


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(help="A jsonl, json, csv or parquet file.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="[default: the file's name without its suffix]")] = None,
) -> None:
    """Check and store a file of rows with a `prompt` column."""
    dataset = connect().datasets.from_file(file, name=name)
    rows = "1 row" if dataset.rows == 1 else f"{dataset.rows} rows"
    print(f"Uploaded dataset {dataset.name}: {rows}, columns {', '.join(dataset.columns)}")
    if dataset.prompt_lengths:
        print(f"Prompts: {lengths(dataset)}")


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
            ("prompts", lengths(dataset)),
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


def lengths(dataset: Dataset) -> str:
    """The range, the bucket that holds the middle row, and a bar for each bucket."""
    buckets = dataset.prompt_lengths
    if len(buckets) < 2:
        return "".join(f"{_span(bucket.low, bucket.high)} characters" for bucket in buckets)
    up_to = accumulate(bucket.rows for bucket in buckets)
    half = sum(bucket.rows for bucket in buckets) / 2
    median = next(bucket for bucket, rows in zip(buckets, up_to, strict=True) if rows >= half)
    # Bars stand on zero, not on the smallest bucket.
    bars = sparkline([0, *(bucket.rows for bucket in buckets)])[1:]
    return f"{_span(buckets[0].low, buckets[-1].high)} characters, median in {_span(median.low, median.high)}  {bars}"


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"
