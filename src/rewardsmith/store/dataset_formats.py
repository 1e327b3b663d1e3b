"""Rows out of a jsonl, json, csv or parquet file, each with its place, or the reason why it is no row.

What is wrong with the file as a whole raises DatasetError. Text is UTF-8, with or without a byte order mark. What the
columns mean is not known here.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rewardsmith.errors import DatasetError

Row = dict[str, Any]
Numbered = tuple[str, Row | str]  # where it is; the row, or what is wrong with it


def jsonl_rows(file: Path) -> Iterator[Numbered]:
    """One object per line; blank lines count as lines, not as rows."""
    text = _text(file)
    if text.lstrip().startswith("["):
        raise DatasetError("a .jsonl file has one object per line, and this is a JSON list; name the file .json")
    number = 0
    for line_number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        if line.strip():
            number += 1
            yield f"row {number} (line {line_number})", _json_row(line.rstrip("\r\n"))


def json_rows(file: Path) -> Iterator[Numbered]:
    """A list of objects."""
    try:
        rows = _parsed(_text(file))
    except json.JSONDecodeError as error:
        hint = "; a file with one object per line is named .jsonl" if error.msg == "Extra data" else ""
        place = f"line {error.lineno}, character {error.colno}"
        raise DatasetError(f"this is not JSON: {error.msg} at {place}{hint}") from None
    except ValueError as error:
        raise DatasetError(f"this is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise DatasetError(f"a .json file is a list of objects, and this is {kind(rows)}")
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row if isinstance(row, dict) else f"it is {kind(row)}, not an object"


def csv_rows(file: Path) -> Iterator[Numbered]:
    """Cells separated by commas, names in the first line. Cells stay text."""
    csv.field_size_limit(2**31 - 1)  # of the whole process; a prompt may be longer than the 128 KiB it comes with
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    number, end = 0, 0
    names: list[str] | None = None
    while True:
        where = f"row {number + 1} (line {end + 1})"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if names is None:
                raise DatasetError(f"line 1: broken quotes ({error})") from None
            yield where, f'broken quotes ({error}); a quote inside a quoted cell is written twice, as ""'
            return
        end = reader.line_num
        if cells is None:
            break
        if names is None:
            names = cells
            _check_names(names)
        elif cells:
            number += 1
            fits = len(cells) == len(names)
            yield where, dict(zip(names, cells, strict=True)) if fits else _uneven(cells, names)
    if number == 0:
        raise DatasetError(f"nothing but a header: {', '.join(names or [])}")


def parquet_rows(file: Path) -> Iterator[Numbered]:
    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"this is not a Parquet file: {error}") from None
    names = table.schema_arrow.names
    _check_names(names)
    if table.metadata.num_rows == 0:
        raise DatasetError(f"there are no rows in it; its columns: {', '.join(names)}")
    number = 0
    try:
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield f"row {number}", _plain_row(row)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DatasetError(f"what follows row {number} cannot be read: {error}") from None


def kind(value: object) -> str:
    """What JSON calls a value, for a message."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


def _text(file: Path) -> str:
    data = file.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DatasetError("the file is UTF-16; save it as UTF-8")
    nul = data.find(b"\0")
    if nul >= 0:
        raise DatasetError(f"the byte at position {nul} (line {_line(data, nul)}) is NUL, so this is not a text file")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = f"position {error.start} (line {_line(data, error.start)})"
        raise DatasetError(
            f"the file is not UTF-8: byte 0x{data[error.start]:02x} at {place}; save it as UTF-8"
        ) from None


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _parsed(text: str) -> Any:
    """Raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; use null")


def _json_row(line: str) -> Row | str:
    try:
        row = _parsed(line)
    except json.JSONDecodeError as error:
        return f"broken JSON: {error.msg} at character {error.pos + 1}"
    except ValueError as error:
        return str(error)
    return row if isinstance(row, dict) else f"it is {kind(row)}, not an object"


def _check_names(names: Sequence[str]) -> None:
    """Raises DatasetError for a header that does not name every column once."""
    if not names:
        raise DatasetError("the first line is empty; it has to name the columns")
    if len(names) == 1 and {";", "\t"} & set(names[0]):
        raise DatasetError(f"the header is one column, {names[0]!r}; separate the cells with commas")
    for position, name in enumerate(names, 1):
        if not name.strip():
            raise DatasetError(f"column {position} of the header has no name; columns found: {', '.join(names)}")
        if names.count(name) > 1:
            raise DatasetError(f"the header names the column {name!r} twice; rename one of them")


def _uneven(cells: Sequence[str], names: Sequence[str]) -> str:
    return f"it has {len(cells)} cells, the header has {len(names)}; quote a cell that has a comma in it"


def _plain_row(row: Row) -> Row | str:
    try:
        return {name: _plain(value) for name, value in row.items()}
    except ValueError as error:
        return str(error)


def _plain(value: Any) -> Any:
    """A value of Parquet as JSON has it. Raises ValueError."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise ValueError(f"it has a value of type {type(value).__name__}, which JSON cannot hold; turn it into text")
