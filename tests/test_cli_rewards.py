"""`rewardsmith reward test`, as a process with real files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import Server

from rewardsmith import ConfigError, RewardFunctionsConfig, Rewardsmith
from rewardsmith.cli.rewards import read_functions

REWARDS = '''\
"""Rewards of a test."""


def form(prompt, completion, example):
    return float(completion.startswith("#### "))


def answer(prompt, completion, example):
    import re

    number = re.search(r"#### (.*)", completion).group(1)
    return float(number == example["answer"])
'''
ROWS = [{"prompt": f"What is {n} times 7?", "answer": str(n * 7)} for n in range(11, 21)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    completions = [
        {"row": number, "completion": text}
        for number, row in enumerate(ROWS)
        for text in (f"#### {row['answer']}", "#### 5", "I do not know", f"It is #### {row['answer']}")
    ]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in completions))
    return tmp_path


def command(folder: Path, *arguments: str, ok: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, "-m", "rewardsmith", "reward", "test", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**kept, **variables},
        timeout=120,
    )
    assert (done.returncode == 0) == ok, f"{done.stdout}\n{done.stderr}"
    return done


def test_figures_first_and_findings_last(folder: Path) -> None:
    done = command(
        folder,
        *("rewards.py", "--dataset", "rows.jsonl", "--completions", "completions.jsonl", "--json", "report.json"),
        *("--set", "num_generations=4", "--set", "effective_batch_size=8"),
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "2 reward functions, 10 rows, 40 completions (completions.jsonl)"
    assert max(map(len, lines)) <= 100 and "\x1b" not in done.stdout
    starts = [" ".join(line.split()[:2]) for line in lines]
    first = starts.index("1. SERIOUS:")
    assert starts[2] == "Scores weight" and starts.index("Probes empty") < first
    assert lines[first].startswith("1. SERIOUS: `answer` fails in 10 of 40 calls")
    # The line of the file, not that of the function's text.
    assert "rewards.py, line 11" in " ".join(lines[first : first + 3])
    assert "scoring 40 completions" in done.stderr
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert report["findings"][0]["kind"] == "failing"
    assert report["functions"][1]["outcomes"] == {"ok": 30, "exception": 10}
    assert report["total"]["basis"] == "measured"


def test_only_the_probes_of_some_rows(folder: Path) -> None:
    said = command(folder, "rewards.py", "--dataset", "rows.jsonl", "--rows", "3").stdout
    assert said.startswith("2 reward functions, 3 rows, no completions") and "There were no completions" in said


def test_functions_as_a_config_in_json(folder: Path) -> None:
    functions = RewardFunctionsConfig(functions={"half": half})
    (folder / "rewards.json").write_text(json.dumps(functions.to_wire()))
    said = command(folder, "rewards.json", "--dataset", "rows.jsonl").stdout
    assert said.startswith("1 reward function, 10 rows") and "`half` gives 0.50 to every probe" in said


def half(prompt, completion, example):
    return 0.5


HELPER = "\n\ndef helper(a, b):\n    return a\n"


OUTER = "import re\n\n\ndef f(prompt, completion, example):\n    return re.X\n"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("helper.py", REWARDS + HELPER, ["helper.py, line 15", "`helper(a, b)`", "helper functions go inside"]),
        ("outer.py", OUTER, ["outer.py, line 5", "`import re`"]),
        ("empty.py", "x = 1\n", ["has no top-level function"]),
        ("broken.py", "def f(:\n", ["broken.py, line 1"]),
        ("broken.json", "{", ["broken.json, line 1", "a Python file is named .py"]),
        ("odd.json", '{"f": 3}', ["'f' is a int"]),
        ("rewards.yaml", "f: 1", ["rewards.yaml, line 1"]),
        ("missing.py", None, ["missing.py: No such file"]),
    ],
)
def test_files_that_hold_no_rewards(folder: Path, name: str, text: str | None, told: list[str]) -> None:
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_functions(folder / name)
    assert all(part in str(refused.value) for part in told), refused.value


def test_functions_come_in_the_order_of_the_file_with_their_lines(folder: Path) -> None:
    functions, origins = read_functions(folder / "rewards.py")
    assert list(functions) == ["form", "answer"]
    assert origins == {"form": (str(folder / "rewards.py"), 4), "answer": (str(folder / "rewards.py"), 8)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["missing.py", "--dataset", "rows.jsonl"], "missing.py: No such file"),
        (["rewards.py", "--dataset", "missing"], "there is no file 'missing', and no server"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_code_1(folder: Path, arguments: list[str], told: str) -> None:
    done = command(folder, *arguments, ok=False, REWARDSMITH_BASE_URL="http://127.0.0.1:9")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and line.startswith("error: ") and told in line


@pytest.mark.slow
def test_a_dataset_of_the_server(folder: Path, server: Server) -> None:
    variables = {"REWARDSMITH_BASE_URL": server.url, "REWARDSMITH_HOME": str(server.home)}
    token = (server.home / "owner-token").read_text().strip()
    Rewardsmith(base_url=server.url, api_token=token, quiet=True).datasets.from_file(folder / "rows.jsonl", name="sums")
    said = command(folder, "rewards.py", "--dataset", "sums", REWARDSMITH_API_TOKEN=token, **variables).stdout
    assert said.startswith("2 reward functions, 10 rows")


@pytest.mark.slow
def test_completions_sampled_from_a_base_model(folder: Path) -> None:
    done = command(
        folder,
        *("rewards.py", "--dataset", "rows.jsonl", "--base-model", "countdown-tiny", "--rows", "2", "--samples", "2"),
        *("--set", "sampling_params.max_tokens=8"),
    )
    assert done.stdout.startswith("2 reward functions, 2 rows, 4 completions (sampled from countdown-tiny)")
    assert "sampling 2 x 2 completions from countdown-tiny" in done.stderr
    assert "At most" in done.stdout or "at most" in done.stdout, "groups of 16 were asked for, and 2 drawn"
