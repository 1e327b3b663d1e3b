"""The rewards on real rows: every row's own answer earns full marks, and the answer of another row does not."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewardsmith import RewardFunction
from rewardsmith.rewards.library import json_schema, numeric_match, sql_match, tool_call, with_settings

DATA = Path(__file__).parents[4] / "shared" / "data"


def rows_of(name: str) -> list[dict[str, Any]]:
    file = DATA / name
    if not file.exists():
        pytest.skip(f"needs ../shared/data/{name}")
    return [json.loads(line) for line in file.read_text().splitlines()]


def travelled(reward: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """The function made from its text, as a worker makes it."""
    return with_settings(reward, **settings).function


@pytest.mark.parametrize("file", ["gsm8k/test.jsonl", "gsm8k/train2000.jsonl"])
def test_gsm8k(file: str) -> None:
    rows, reward = rows_of(file), travelled(numeric_match)
    loose, whole = travelled(numeric_match, anywhere=True), travelled(numeric_match, column="solution")
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        assert reward(row["prompt"], row["solution"], row) == 1.0
        assert loose(row["prompt"], row["solution"], row) == 1.0
        assert whole(row["prompt"], row["solution"], row) == 1.0
        assert reward(row["prompt"], row["solution"].replace("####", "so"), row) == 0.0
        assert reward(row["prompt"], other["solution"], row) == float(row["answer"] == other["answer"])


def test_chinook() -> None:
    rows = rows_of("text2sql_chinook/questions.jsonl")
    reward = travelled(sql_match, folder=str(DATA / "text2sql_chinook"))
    strangers = 0.0
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        assert reward(row["prompt"], row["sql"], row) == 1.0
        assert reward(row["prompt"], f"```sql\n{row['sql']};\n```", row) == 1.0
        same = sorted(map(str, row["result"])) == sorted(map(str, other["result"]))
        assert reward(row["prompt"], other["sql"], row) <= same
        strangers += same
    assert strangers < len(rows) / 10


def test_chinook_minds_the_order_where_the_rows_say_so() -> None:
    rows = rows_of("text2sql_chinook/questions.jsonl")
    reward = travelled(sql_match, folder=str(DATA / "text2sql_chinook"))
    turned = 0
    for row in rows:
        if len(row["result"]) > 1:
            backwards = ", ".join(f"({', '.join(map(written, found))})" for found in reversed(row["result"]))
            assert reward(row["prompt"], f"VALUES {backwards}", row) == float(not row["order_matters"])
            turned += row["order_matters"]
    assert turned >= 5


def written(value: Any) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else json.dumps(value)


def first_accepted(options: Any) -> Any:
    """A value made of the first accepted ones."""
    if isinstance(options, dict):
        chosen = {name: [option for option in inner if option != ""] for name, inner in options.items()}
        return {name: first_accepted(inner[0]) for name, inner in chosen.items() if inner}
    return [first_accepted(inner) for inner in options] if isinstance(options, list) else options


def test_bfcl() -> None:
    rows, reward, share = (
        rows_of("bfcl_simple/bfcl_simple_python.jsonl"),
        travelled(tool_call),
        travelled(tool_call, partial=True),
    )
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        ((name, accepted),) = row["ground_truth"].items()
        arguments = first_accepted(accepted)
        call = json.dumps({"name": name, "arguments": arguments})
        assert reward(row["prompt"], call, row) == 1.0
        assert reward(row["prompt"], f"<tool_call>\n{call}\n</tool_call>", row) == 1.0
        assert reward(other["prompt"], call, other) == 0.0
        wrong = json.dumps({"name": name, "arguments": {**arguments, "no_such_argument": 1}})
        assert reward(row["prompt"], wrong, row) == 0.0
        assert 0 < share(row["prompt"], wrong, row) < 1
        required = [key for key, options in accepted.items() if "" not in options]
        if required:
            less = {key: value for key, value in arguments.items() if key != required[0]}
            assert reward(row["prompt"], json.dumps({"name": name, "arguments": less}), row) == 0.0


def test_a_schema_of_the_bfcl_calls() -> None:
    call = {"type": "object", "properties": {"name": {"type": "string"}, "arguments": {"type": "object"}}}
    reward = travelled(json_schema, schema={**call, "required": ["name", "arguments"], "additionalProperties": False})
    for row in rows_of("bfcl_simple/bfcl_simple_python.jsonl"):
        ((name, accepted),) = row["ground_truth"].items()
        assert reward("", json.dumps({"name": name, "arguments": first_accepted(accepted)}), row) == 1.0
        assert reward("", json.dumps({name: first_accepted(accepted)}), row) == 0.0


# ---- a reward that only fits one kind of task, as a user would write it ---------------------------------------------


def sudoku(prompt: str, completion: str, example: dict[str, Any]) -> float:
    """1 for a filled 4x4 grid inside <answer> that keeps the given digits and the rules; several may do."""
    import re

    found = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    grid = re.sub(r"\s", "", found[-1]) if len(found) == 1 else ""
    if not re.fullmatch("[1-4]{16}", grid):
        return 0.0
    if any(given not in ("0", digit) for given, digit in zip(example["puzzle"], grid, strict=True)):
        return 0.0
    rows = [range(start, start + 4) for start in range(0, 16, 4)]
    columns = [range(start, 16, 4) for start in range(4)]
    boxes = [[start, start + 1, start + 4, start + 5] for start in (0, 2, 8, 10)]
    return float(all(len({grid[place] for place in part}) == 4 for part in [*rows, *columns, *boxes]))


def test_sudoku() -> None:
    reward = RewardFunction.from_callable(sudoku).function
    rows = rows_of("sudoku_4x4/sudoku_4x4_test.jsonl")
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        lines = "\n".join(" ".join(line) for line in re.findall("....", row["solution"]))
        assert reward(row["prompt"], f"<answer>{row['solution']}</answer>", row) == 1.0
        assert reward(row["prompt"], f"So:\n<answer>\n{lines}\n</answer>", row) == 1.0
        assert reward(row["prompt"], f"<answer>{row['puzzle']}</answer>", row) == 0.0
        assert reward(row["prompt"], f"<answer>{'1234' * 4}</answer>", row) == 0.0
        assert reward(row["prompt"], f"<answer>{row['solution']}</answer>" * 2, row) == 0.0
        fits = all(given in ("0", digit) for given, digit in zip(row["puzzle"], other["solution"], strict=True))
        assert reward(row["prompt"], f"<answer>{other['solution']}</answer>", row) == float(fits)
