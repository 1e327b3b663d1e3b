"""What a file is refused for, word by word, and what an accepted one becomes."""

import itertools
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rewardsmith.errors import DatasetError
from rewardsmith.store.dataset_file import RESERVED_COLUMNS, Summary, check_file, histogram

LIMIT = 1_000_000


def check(tmp_path: Path, name: str, content: bytes, limit: int = LIMIT) -> tuple[Summary, list[dict[str, Any]]]:
    """The summary and the rows as the job reads them."""
    (tmp_path / "received").write_bytes(content)
    canonical = tmp_path / "canonical"
    canonical.unlink(missing_ok=True)
    summary = check_file(tmp_path / "received", name, canonical, limit)
    return summary, [json.loads(line) for line in canonical.read_bytes().splitlines()]


def refusal(tmp_path: Path, name: str, content: bytes, limit: int = LIMIT) -> str:
    with pytest.raises(DatasetError) as caught:
        check(tmp_path, name, content, limit)
    return caught.value.message.removeprefix(f"{name} was refused and nothing was stored: ")


def parquet(rows: list[dict[str, Any]] | pa.Table, tmp_path: Path) -> bytes:
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


MIXED = {
    "prompt": "Zwei + zwei = ",
    "answer": 4,
    "ratio": 0.25,
    "exact": True,
    "none": None,
    "numbers": [1, 2.5, [3]],
    "meta": {"level": "easy", "tags": ["a", "ü"]},
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "ROWS.JSONL"])
def test_types_are_kept(tmp_path: Path, name: str) -> None:
    row = MIXED | ({"numbers": [1.0, 2.5]} if name.endswith("parquet") else {})
    if name.endswith("parquet"):
        content = parquet([row], tmp_path)
    else:
        content = json.dumps([row] if name == "rows.json" else row).encode() + b"\r\n\r\n"
    summary, rows = check(tmp_path, name, content)
    assert rows == [row]
    assert [type(value) for value in rows[0].values()] == [type(value) for value in row.values()]
    assert (summary.rows, summary.columns) == (1, list(MIXED))


def test_cells_of_csv_stay_text(tmp_path: Path) -> None:
    content = '\ufeffprompt,answer,note\r\n"a, ""b""\nc",007,\r\n\r\nlast,1.50,x'.encode()
    _, rows = check(tmp_path, "rows.csv", content)
    assert rows == [
        {"prompt": 'a, "b"\nc', "answer": "007", "note": ""},
        {"prompt": "last", "answer": "1.50", "note": "x"},
    ]


def test_parquet_times_and_decimals_become_text(tmp_path: Path) -> None:
    row = {
        "prompt": "p",
        "at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "day": date(2026, 1, 2),
        "price": Decimal("1.10"),
        "pairs": {"a": 1},
    }
    _, rows = check(tmp_path, "rows.parquet", parquet([row], tmp_path))
    assert rows == [
        {"prompt": "p", "at": "2026-01-02T03:04:05+00:00", "day": "2026-01-02", "price": "1.10", "pairs": {"a": 1}}
    ]


def test_rows_may_have_different_columns_and_long_prompts(tmp_path: Path) -> None:
    long = "x" * 300_000
    content = f'{{"prompt": "a", "u": 1}}\n\n{{"v": 2, "prompt": "{long}"}}\n'.encode()
    summary, rows = check(tmp_path, "rows.jsonl", content)
    assert summary.columns == ["prompt", "u", "v"] and rows[1]["v"] == 2
    _, rows = check(tmp_path, "rows.csv", f"prompt,answer\n{long},1\n".encode())
    assert rows[0]["prompt"] == long


def test_the_same_rows_have_the_same_digest_in_every_format(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b", "n": "1"}, {"prompt": "c", "n": "2"}]
    files = {
        "x.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
        "x.json": json.dumps(rows).encode(),
        "x.csv": "prompt,n\na\u2028b,1\nc,2\n".encode(),
        "x.parquet": parquet(rows, tmp_path),
    }
    assert len({check(tmp_path, name, content)[0].sha256 for name, content in files.items()}) == 1


JSONL_REASONS = [
    (b'{"prompt": ""}', "`prompt` is empty"),
    (b'{"prompt": " \\n\\t"}', "`prompt` is empty"),
    (b'{"prompt": null}', "`prompt` is null, not text"),
    (b'{"prompt": 7}', "`prompt` is a number, not text"),
    (b'{"prompt": true}', "`prompt` is true or false, not text"),
    (b'{"prompt": [{"role": "user"}]}', "`prompt` is a list, not text"),
    (b'{"question": "q", "answer": 1}', "no `prompt`; its columns: question, answer"),
    (b"{}", "no `prompt`; its columns: none"),
    (b'"prompt"', "it is text, not an object"),
    (b"[1]", "it is a list, not an object"),
    (b'{"prompt": "a"', "broken JSON: Expecting ',' delimiter at character 15"),
    (b"prompt: a", "broken JSON: Expecting value at character 1"),
    (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice in one object"),
    (b'{"prompt": "a", "m": {"k": 1, "k": 2}}', "the key 'k' stands twice in one object"),
    (b'{"prompt": "a", "x": NaN}', "NaN is not JSON; use null"),
    (b'{"prompt": "a", "x": [1e999]}', "`x` has a value that JSON cannot hold: NaN, infinite, or half a character"),
    (b'{"prompt": "\\ud800"}', "`prompt` has a value that JSON cannot hold: NaN, infinite, or half a character"),
    (b'{"prompt": "a", "x": ' + b"[" * 33 + b"]" * 33 + b"}", "`x` has lists or objects more than 32 deep"),
    (b'{"prompt": "a", "x": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", "its values are nested too deeply"),
    (b'{"prompt": "a", "split": "test"}', "`split` is 'test'; it must be train or evaluation"),
    (b'{"prompt": "a", "split": null}', "`split` is None; it must be train or evaluation"),
]


@pytest.mark.parametrize(("line", "reason"), JSONL_REASONS)
def test_a_wrong_line_is_named_by_row_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    content = b'{"prompt": "good"}\n\n' + line + b'\n{"prompt": "good"}\n'
    lines = refusal(tmp_path, "rows.jsonl", content).splitlines()
    assert lines[:2] == ["1 row is wrong", f"  row 2 (line 3): {reason}"]
    assert lines[-1].startswith("  columns found: prompt")


def test_depth_up_to_the_limit_is_fine(tmp_path: Path) -> None:
    check(tmp_path, "rows.jsonl", b'{"prompt": "a", "x": ' + b"[" * 32 + b"]" * 32 + b"}")


def test_ten_wrong_rows_are_named_and_all_are_counted(tmp_path: Path) -> None:
    content = b'{"prompt": "good"}\n' + b'{"prompt": ""}\n' * 25
    lines = refusal(tmp_path, "rows.jsonl", content).splitlines()
    assert lines[0] == "25 rows are wrong"
    assert lines[1:11] == [f"  row {n} (line {n}): `prompt` is empty" for n in range(2, 12)]
    assert lines[11:] == ["  and 15 more", "  columns found: prompt"]


WHOLE_FILE = [
    ("rows.jsonl", b"", "the file is empty"),
    ("rows.jsonl", b"\n \n", "there are no rows in it"),
    (
        "rows.jsonl",
        b'[{"prompt": "a"}]',
        "a .jsonl file has one object per line, and this is a JSON list; name the file .json",
    ),
    (
        "rows.jsonl",
        b'{"q": "a"}\n{"r": 1}\n',
        "no column `prompt`; columns found: q, r. Rename the one with the prompts to `prompt`",
    ),
    ("rows.json", b"[]", "there are no rows in it"),
    ("rows.json", b'{"prompt": "a"}', "a .json file is a list of objects, and this is an object"),
    (
        "rows.json",
        b'{"prompt": "a"}\n{"prompt": "b"}',
        "this is not JSON: Extra data at line 2, character 1; a file with one object per line is named .jsonl",
    ),
    (
        "rows.json",
        b'[{"prompt": "a"},\n {"prompt" "b"}]',
        "this is not JSON: Expecting ':' delimiter at line 2, character 12",
    ),
    ("rows.json", b'[{"prompt": "a", "x": Infinity}]', "this is not JSON: Infinity is not JSON; use null"),
    ("rows.json", b'[{"a": 1, "a": 2}]', "this is not JSON: the key 'a' stands twice in one object"),
    (
        "rows.json",
        b'[{"prompt": "a"}, 3]',
        "1 row is wrong\n  row 2: it is a number, not an object\n  columns found: prompt",
    ),
    ("rows.csv", b"prompt,answer\n", "nothing but a header: prompt, answer"),
    ("rows.csv", b"prompt,answer", "nothing but a header: prompt, answer"),
    ("rows.csv", b"\n\n", "the first line is empty; it has to name the columns"),
    (
        "rows.csv",
        b"question,answer\na,b\n",
        "no column `prompt`; columns found: question, answer. Rename the one with the prompts to `prompt`",
    ),
    ("rows.csv", b"prompt,answer,prompt\na,b,c\n", "the header names the column 'prompt' twice; rename one of them"),
    ("rows.csv", b"prompt,,x\na,b,c\n", "column 2 of the header has no name; columns found: prompt, , x"),
    ("rows.csv", b"prompt;answer\na;b\n", "the header is one column, 'prompt;answer'; separate the cells with commas"),
    ("rows.parquet", b"PAR1 but no more", "this is not a Parquet file: "),
    (
        "rows.csv",
        b"prompt\ngood\n\xe4hm\n",
        "the file is not UTF-8: byte 0xe4 at position 12 (line 3); save it as UTF-8",
    ),
    ("rows.jsonl", b'{"prompt": "\xff"}', "the file is not UTF-8: byte 0xff at position 12 (line 1); save it as UTF-8"),
    ("rows.csv", "prompt\nä\n".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
    ("rows.csv", b"prompt\na\0b\n", "the byte at position 8 (line 2) is NUL, so this is not a text file"),
    (
        "rows.jsonl",
        b'{"prompt": "a", "total_reward": 1}',
        f"the column `total_reward` needs another name: {RESERVED_COLUMNS['total_reward']}",
    ),
    (
        "rows.csv",
        b"prompt,advantage\na,b\n",
        f"the column `advantage` needs another name: {RESERVED_COLUMNS['advantage']}",
    ),
    ("rows.jsonl", b'{"prompt": "a", " ": 1}', "there is a column without a name; columns found: prompt,  "),
    (
        "rows.jsonl",
        b'{"prompt": "a", "split": "train"}\n{"prompt": "b"}',
        "row 2 (line 2) has no `split`, though others have; give each row one",
    ),
    (
        "rows.jsonl",
        b'{"prompt": "a", "split": "evaluation"}',
        "`split` is evaluation in every row; nothing is left to train on",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), WHOLE_FILE)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    said = refusal(tmp_path, name, content)
    assert said.startswith(message) if message.endswith(": ") else said == message


def test_wrong_rows_of_csv_are_named_by_row_and_first_line(tmp_path: Path) -> None:
    content = b'prompt,answer\n"two\nlines",1\nshort\n\n,empty\na,b,c\n"never closed,1\nx,y\n'
    assert refusal(tmp_path, "rows.csv", content).splitlines() == [
        "4 rows are wrong",
        "  row 2 (line 4): it has 1 cells, the header has 2; quote a cell that has a comma in it",
        "  row 3 (line 6): `prompt` is empty",
        "  row 4 (line 7): it has 3 cells, the header has 2; quote a cell that has a comma in it",
        "  row 5 (line 8): broken quotes (unexpected end of data); "
        'a quote inside a quoted cell is written twice, as ""',
        "  columns found: prompt, answer",
    ]


def test_wrong_parquet_files(tmp_path: Path) -> None:
    def said(table: Any) -> str:
        return refusal(tmp_path, "rows.parquet", parquet(table, tmp_path))

    empty = pa.table({"prompt": pa.array([], pa.string()), "n": pa.array([], pa.int64())})
    assert said(empty) == "there are no rows in it; its columns: prompt, n"
    assert said([{"question": "q"}]).startswith("no column `prompt`; columns found: question.")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    assert said(twice) == "the header names the column 'prompt' twice; rename one of them"
    row_2 = "row 2: it has a value of type bytes, which JSON cannot hold; turn it into text"
    assert row_2 in said([{"prompt": "a", "x": None}, {"prompt": "b", "x": b"\xff"}])
    assert "row 1: `prompt` is null, not text" in said([{"prompt": None}, {"prompt": "b"}])
    assert "row 1: `x` has a value that JSON cannot hold" in said([{"prompt": "a", "x": float("nan")}])
    broken = bytearray(parquet([{"prompt": "some text " * 50, "n": n} for n in range(500)], tmp_path))
    broken[20:60] = b"\xff" * 40
    assert refusal(tmp_path, "rows.parquet", bytes(broken)).startswith("what follows row 0 cannot be read: ")


def test_a_completion_column_is_fine(tmp_path: Path) -> None:
    _, rows = check(tmp_path, "rows.jsonl", b'{"prompt": "a", "completion": "b", "score": 1, "step": 2}')
    assert rows[0]["completion"] == "b"


def test_the_size_limit_holds_for_the_file_and_for_its_rows(tmp_path: Path) -> None:
    row = b'{"prompt": "0123456789"}\n'
    check(tmp_path, "rows.jsonl", row * 4, limit=len(row) * 4)
    assert refusal(tmp_path, "rows.jsonl", row * 5, limit=len(row) * 4) == (
        "it has 125 bytes, and this server takes up to 100; split it or shorten it"
    )
    bomb = parquet([{"prompt": "x" * 100_000}] * 50, tmp_path)
    assert len(bomb) < 20_000
    assert "its rows take over 160,000 bytes as JSON lines" in refusal(tmp_path, "rows.parquet", bomb, limit=20_000)


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.jsonl.gz", ".csv"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=r"a dataset is a \.jsonl, \.json, \.csv or \.parquet file"):
        check(tmp_path, name, b"x")


def test_the_histogram_counts_every_prompt_once() -> None:
    assert [bucket.model_dump() for bucket in histogram([3, 3, 4])] == [
        {"low": 3, "high": 3, "rows": 2},
        {"low": 4, "high": 4, "rows": 1},
    ]
    lengths = [10 * n for n in range(100)]
    buckets = histogram(lengths)
    assert [(bucket.low, bucket.high) for bucket in buckets[:2]] == [(0, 99), (100, 199)]
    assert sum(bucket.rows for bucket in buckets) == 100 and len(buckets) == 10
    for wide in ([1, 100_000], [7], [99, 101, 5000]):
        buckets = histogram(wide)
        assert sum(bucket.rows for bucket in buckets) == len(wide) and len(buckets) <= 14
        assert all(earlier.high + 1 == later.low for earlier, later in itertools.pairwise(buckets))
