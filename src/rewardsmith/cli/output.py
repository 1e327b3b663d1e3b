"""What commands print: tables and details for people, JSON for programs, one line for an error.

Tables are cut to the width of a terminal and never in a pipe. Texts that come from a server are shown without their
control characters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewardsmith.client import Rewardsmith
from rewardsmith.client.view import printable
from rewardsmith.errors import RewardsmithError
from rewardsmith.quantities import duration

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

STATUS_STYLES = {
    "queued": "yellow",
    "training": "cyan",
    "stopping": "cyan",
    "completed": "green",
    "stopped": "green",
    "canceled": "dim",
    "errored": "red",
}
_UNLIMITED = 100_000


def connect() -> Rewardsmith:
    return Rewardsmith(quiet=True)


def console() -> Console:
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=_UNLIMITED)


def print_error(error: Exception) -> None:
    """One red line. Errors that are not the package's own also say how to see more."""
    text = str(error)
    if not isinstance(error, RewardsmithError | OSError):
        text = f"unexpected {type(error).__name__}: {text} (REWARDSMITH_TRACEBACK=1 shows where)"
    line = Text.assemble(("error: ", "bold red"), (printable(text), "red"))
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def print_json(value: object) -> None:
    """Wire models and SDK objects under the names that Python users see."""
    plain = to_jsonable_python(value, by_alias=False)
    print(json.dumps(plain, indent=2, ensure_ascii=not sys.stdout.isatty()))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Columns whose name ends in `>` are aligned to the right. `empty` says what to do when there are no rows."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(_text(cell))) for cell in row))
    if table.row_count:
        console().print(table)
    else:
        print(empty)


def print_details(rows: Iterable[tuple[str, object]]) -> None:
    """One `name  value` line for each value that is there."""
    known = [(name, value) for name, value in rows if value is not None and value != ""]
    width = max((len(name) for name, _ in known), default=0)
    for name, value in known:
        shown = value if isinstance(value, Text) else Text(printable(_text(value)))
        console().print(Text.assemble((f"{name:<{width}}  ", "dim"), shown), soft_wrap=True)


def status(word: str) -> Text:
    return Text(printable(word), STATUS_STYLES.get(word, ""))


def age(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return f"{duration(max(0.0, (datetime.now(UTC) - aware).total_seconds()))} ago"


def reward(value: float | None) -> str:
    return "--" if value is None else f"{value:.4f}"


def _text(value: Any) -> str:
    return "--" if value is None else str(value)
