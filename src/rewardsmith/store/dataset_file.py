"""Checking one dataset file: jsonl, json, csv or parquet in, canonical JSON lines and a summary out, or DatasetError.

Types are kept as far as JSON has them; dates, times and decimals of Parquet become text, cells of csv stay text
(contract 2.3). An error names up to ten rows with their number (and line, where the file has lines) and reason.
Nothing here knows which datasets exist.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewardsmith import wire
from rewardsmith.errors import DatasetError
from rewardsmith.store import dataset_formats
from rewardsmith.store.dataset_formats import Numbered, Row, kind

FORMATS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": dataset_formats.jsonl_rows,
    ".json": dataset_formats.json_rows,
    ".csv": dataset_formats.csv_rows,
    ".parquet": dataset_formats.parquet_rows,
}
SPLITS = ("train", "evaluation")
RESERVED_COLUMNS = {
    "total_reward": "training computes it for each completion and shows it beside the columns of the row",
    "advantage": "training computes it for each completion and shows it beside the columns of the row",
}
DEEPEST = 32  # lists and objects inside each other
CANONICAL_GROWTH = 8  # JSON repeats the column names in each row
PROBLEMS_SHOWN = 10
MOST_BUCKETS = 12


@dataclass(frozen=True)
class Summary:
    """Of an accepted file. `columns` are in the order of their first appearance."""

    sha256: str
    rows: int
    columns: list[str]
    prompt_lengths: list[wire.LengthBucket]


def format_of(file_name: str) -> str:
    """The suffix that names the format. Raises DatasetError for one that is not read."""
    suffix = Path(file_name).suffix.lower()
    if suffix not in FORMATS:
        raise DatasetError(f"{file_name}: a dataset is a .jsonl, .json, .csv or .parquet file; save it as one of these")
    return suffix


def check_file(file: Path, file_name: str, canonical: Path, max_bytes: int) -> Summary:
    """Check `file`, which its user calls `file_name`, and write its rows to `canonical`. Raises DatasetError."""
    try:
        return _check(file, FORMATS[format_of(file_name)], canonical, max_bytes)
    except DatasetError as error:
        raise DatasetError(f"{file_name} was refused and nothing was stored: {error.message}") from None


@dataclass
class _Findings:
    """What one pass over the rows collects."""

    columns: dict[str, None] = field(default_factory=dict)
    prompt_lengths: list[int] = field(default_factory=list)
    splits: Counter[str] = field(default_factory=Counter)
    first_without_split: str | None = None
    problems: list[str] = field(default_factory=list)
    wrong_rows: int = 0

    def wrong(self, where: str, reason: str) -> None:
        self.wrong_rows += 1
        if self.wrong_rows <= PROBLEMS_SHOWN:
            self.problems.append(f"{where}: {reason}")


def _check(file: Path, read: Callable[[Path], Iterator[Numbered]], canonical: Path, max_bytes: int) -> Summary:
    size = file.stat().st_size
    if size == 0:
        raise DatasetError("the file is empty")
    if size > max_bytes:
        raise DatasetError(f"it has {size:,} bytes, and this server takes up to {max_bytes:,}; split it or shorten it")
    found, digest, written = _Findings(), hashlib.sha256(), 0
    with canonical.open("xb") as out:
        for where, row in read(file):
            try:
                line = _accepted(where, row, found)
            except ValueError as reason:
                found.wrong(where, str(reason))
                continue
            digest.update(line)
            written += out.write(line)
            if written > max_bytes * CANONICAL_GROWTH:
                raise DatasetError(f"its rows take over {max_bytes * CANONICAL_GROWTH:,} bytes as JSON lines; split it")
    _conclude(found)
    lengths = found.prompt_lengths
    return Summary(digest.hexdigest(), len(lengths), list(found.columns), histogram(lengths))


def _accepted(where: str, row: Row | str, found: _Findings) -> bytes:
    """The row as a canonical line. Raises ValueError with the reason why it is not one."""
    if isinstance(row, str):
        raise ValueError(row)
    found.columns |= dict.fromkeys(row)
    prompt = row.get("prompt")
    if "prompt" not in row:
        raise ValueError(f"no `prompt`; its columns: {', '.join(row) or 'none'}")
    if not isinstance(prompt, str):
        raise ValueError(f"`prompt` is {kind(prompt)}, not text")
    if not prompt.strip():
        raise ValueError("`prompt` is empty")
    if "split" in row:
        if row["split"] not in SPLITS:
            raise ValueError(f"`split` is {row['split']!r}; it must be train or evaluation")
        found.splits[row["split"]] += 1
    elif found.first_without_split is None:
        found.first_without_split = where
    line = canonical_line(row)
    found.prompt_lengths.append(len(prompt))
    return line


def _conclude(found: _Findings) -> None:
    """Raises DatasetError when the pass found what is wrong: first with columns, then with rows."""
    listed = ", ".join(found.columns)
    for name in found.columns:
        if name in RESERVED_COLUMNS:
            raise DatasetError(f"the column `{name}` needs another name: {RESERVED_COLUMNS[name]}")
        if not name.strip():
            raise DatasetError(f"there is a column without a name; columns found: {listed}")
    if found.columns and "prompt" not in found.columns:
        raise DatasetError(f"no column `prompt`; columns found: {listed}. Rename the one with the prompts to `prompt`")
    if found.wrong_rows:
        count = "1 row is" if found.wrong_rows == 1 else f"{found.wrong_rows} rows are"
        more = found.wrong_rows - len(found.problems)
        rest = [f"and {more} more"] if more else []
        named = [f"columns found: {listed}"] if found.columns else []
        raise DatasetError("\n  ".join([f"{count} wrong", *found.problems, *rest, *named]))
    if not found.prompt_lengths:
        raise DatasetError("there are no rows in it")
    if found.splits and found.first_without_split:
        raise DatasetError(f"{found.first_without_split} has no `split`, though others have; give each row one")
    if found.splits and not found.splits["train"]:
        raise DatasetError("`split` is evaluation in every row; nothing is left to train on")


def canonical_line(row: Row) -> bytes:
    """The row as one line of JSON in UTF-8. Raises ValueError naming the column that cannot be written so."""
    for name, value in row.items():
        if _deeper_than(value, DEEPEST):
            raise ValueError(f"`{name}` has lists or objects more than {DEEPEST} deep")
    try:
        return _dumped(row)
    except ValueError:
        name = next(name for name, value in row.items() if not _writable({name: value}))
        raise ValueError(f"`{name}` has a value that JSON cannot hold: NaN, infinite, or half a character") from None


def _dumped(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _writable(value: object) -> bool:
    try:
        _dumped(value)
    except ValueError:
        return False
    return True


def _deeper_than(value: Any, levels: int) -> bool:
    if not isinstance(value, (list, dict)):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(item, levels - 1) for item in inside)


def histogram(lengths: Sequence[int]) -> list[wire.LengthBucket]:
    """Rows by prompt length in characters, in at most about a dozen buckets of one round width."""
    if not lengths:
        return []
    width = _round_width((max(lengths) - min(lengths)) // MOST_BUCKETS + 1)
    counts = Counter(length // width for length in lengths)
    return [
        wire.LengthBucket(low=bucket * width, high=bucket * width + width - 1, rows=counts[bucket])
        for bucket in range(min(counts), max(counts) + 1)
    ]


def _round_width(least: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below `least`."""
    power = int("1" + "0" * (len(str(least)) - 1))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)
