"""`rewardsmith.test_rewards`: where rows and completions come from, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

import rewardsmith
from rewardsmith import ConfigError, DatasetError, RewardFunction, RewardFunctionsConfig, test_rewards

ROWS: list[dict[str, Any]] = [{"prompt": f"What is {n} times 7?", "answer": n * 7, "number": n} for n in range(11, 21)]


def right(prompt, completion, example):
    return float(completion.strip() == str(example["answer"]))


def size(prompt, completion, example):
    return min(1.0, len(completion) / 100)


def answers(row: dict[str, Any]) -> list[str]:
    return [str(row["answer"]), "I do not know"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(*entries: dict[str, Any]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_functions_and_rows_as_they_are() -> None:
    report = test_rewards(
        {"right": right, "size": size}, ROWS, completions=[answers(row) for row in ROWS], config={"num_generations": 2}
    )
    assert [function.name for function in report.functions] == ["right", "size"]
    assert (report.rows, report.completions, report.group_size, report.source) == (10, 20, 2, "as given")
    assert report.functions[0].scores.mean == 0.5
    assert str(report).startswith("2 reward functions, 10 rows, 20 completions (as given)")


@pytest.mark.parametrize("form", [right, [right], {"right": right}, RewardFunctionsConfig(functions=[right])])
def test_every_form_of_functions(form: Any) -> None:
    report = test_rewards(form, ROWS[:2])
    assert [function.name for function in report.functions] == ["right"] and report.completions == 0


def test_settings_of_functions_count() -> None:
    functions = {"right": RewardFunction.from_callable(right, weight=2.0, on_error="exclude")}
    (function,) = test_rewards(functions, ROWS[:1]).functions
    assert (function.weight, function.on_error) == (2.0, "exclude")


def test_pytest_does_not_take_it_for_a_test_where_users_import_it() -> None:
    assert rewardsmith.test_rewards.__test__ is False  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_rows_of_a_file(folder: Path, suffix: str) -> None:
    text = {
        ".jsonl": lines(*ROWS),
        ".json": json.dumps(ROWS),
        ".csv": "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in ROWS),
    }[suffix]
    (folder / f"rows{suffix}").write_text(text)
    report = test_rewards(right, f"rows{suffix}", completions=[answers(row) for row in ROWS])
    assert report.functions[0].scores.mean == 0.5


def test_rows_are_taken_evenly_spaced() -> None:
    def place(prompt, completion, example):
        return int(completion)

    # The rows at 0, 3 and 6 of ten.
    report = test_rewards(place, ROWS, completions=[[str(n)] for n in range(10)], rows=3)
    assert (report.rows, report.functions[0].scores.mean, report.functions[0].scores.highest) == (3, 3.0, 6.0)


def recorded(folder: Path, text: str) -> list[tuple[int, int]]:
    """(row, completions) of each group of a file, by how the rows' own functions see them."""
    (folder / "c.jsonl").write_text(text)
    from rewardsmith.rehearsal import _recorded

    return [(row, len(texts)) for row, texts in _recorded(folder / "c.jsonl", ROWS)]


def test_completions_by_row_or_prompt_one_by_one_or_together(folder: Path) -> None:
    text = lines(
        {"row": 3, "completion": "a"},
        {"prompt": ROWS[5]["prompt"], "completions": ["b", "c"]},
        {"row": 3, "prompt": ROWS[3]["prompt"], "completion": "d", "anything": "else"},
    )
    assert recorded(folder, text) == [(3, 2), (5, 2)]
    assert test_rewards(right, ROWS, completions="c.jsonl").completions == 4


def test_what_the_command_line_prints_of_a_run(folder: Path) -> None:
    """`jobs completions --json` is a list; groups are those of one step."""
    entries = [
        {
            "step": step,
            "idx": 0,
            "phase": "train",
            "row": 2,
            "sample": n,
            "prompt": ROWS[2]["prompt"],
            "completion": "x",
        }
        for step in (1, 2)
        for n in range(4)
    ]
    assert recorded(folder, json.dumps(entries, indent=2)) == [(2, 4), (2, 4)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no completion"),
        ("[]", "there is no completion"),
        ("{", "c.jsonl, line 1: "),
        ("[1", "c.jsonl, line 1: "),
        ("\n3\n", "c.jsonl, line 2: an entry is an object"),
        (lines({"row": 3}), "line 1: `completion` is a text"),
        (lines({"row": 3, "completions": []}), "line 1: `completion` is a text"),
        (lines({"row": 3, "completion": 4}), "line 1: `completion` is a text"),
        (lines({"completion": "a"}), "line 1: `row` .* or `prompt` has to say"),
        (lines({"row": 10, "completion": "a"}), "there is no row 10; the dataset has rows 0 to 9"),
        (lines({"row": True, "completion": "a"}), "has to say"),
        (lines({"row": 1, "prompt": "other", "completion": "a"}), "row 1 of the dataset has another prompt"),
        (lines({"prompt": "other", "completion": "a"}), "its prompt is of no row"),
    ],
)
def test_completions_that_fit_no_row(folder: Path, text: str, problem: str) -> None:
    with pytest.raises(DatasetError, match=problem):
        recorded(folder, text)


def test_a_prompt_of_several_rows_needs_the_row(folder: Path) -> None:
    (folder / "c.jsonl").write_text(lines({"prompt": "same", "completion": "a"}))
    rows = [{"prompt": "same", "answer": n} for n in range(2)]
    with pytest.raises(DatasetError, match="its prompt is that of rows 0, 1; name one with `row`"):
        test_rewards(right, rows, completions="c.jsonl")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"dataset": []}, "there are no rows"),
        ({"dataset": [{"question": "?"}]}, "row 0: a row is a dict with a text under `prompt`"),
        ({"dataset": [{"prompt": "?", "x": {1, 2}}]}, "row 0 has a value that JSON cannot hold"),
        ({"dataset": [{"prompt": "?", "x": float("nan")}]}, "row 0 has a value that JSON cannot hold"),
        ({"dataset": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"completions": [["a"]]}, "1 lists of completions for 10 rows"),
        ({"completions": ["a"] * 10}, "the completions of row 0 are no list of texts"),
        ({"completions": [[]] * 10}, "there is no completion"),
        ({"completions": "nowhere.jsonl"}, "nowhere.jsonl: No such file"),
        ({"completions": [["a"]] * 10, "base_model": "countdown-tiny"}, "not both"),
        ({"base_model": "no-such-model"}, "no known alias"),
        ({"rows": 0}, "count from 1"),
        ({"samples": 0}, "count from 1"),
        ({"reward_fns": {}}, "no reward function"),
        ({"config": {"num_generations": 1}}, "num_generations"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises((ConfigError, DatasetError), match=problem):
        test_rewards(**{"reward_fns": right, "dataset": ROWS, **settings})


def test_packages_are_as_for_a_job(capsys: pytest.CaptureFixture) -> None:
    def typed(prompt, completion, example):
        import pydantic

        return float(pydantic.VERSION >= "2")

    functions = RewardFunctionsConfig(functions=[typed], runtime={"packages": ["pydantic>=2"]})
    assert test_rewards(functions, ROWS[:1]).functions[0].faults == []
    assert "packages: pydantic>=2" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="here/there"):
        test_rewards(RewardFunctionsConfig(functions=[right], runtime={"packages": ["./here/there"]}), ROWS[:1])


@pytest.mark.slow
def test_completions_of_the_embedded_model(capsys: pytest.CaptureFixture) -> None:
    from rewardsmith.demo import countdown

    report = test_rewards(
        {"format": countdown.format_reward, "equation": countdown.equation_reward},
        countdown.rows("train", 6),
        base_model="countdown-tiny",
        rows=4,
        config={"num_generations": 8, "effective_batch_size": 8, "sampling_params": {"max_tokens": 96}},
    )
    assert (report.rows, report.completions, report.source) == (4, 32, "sampled from countdown-tiny")
    assert report.total.basis == "measured" and report.total.groups == 4
    # The warm start knows the form; that its answers are not all right is what training is for.
    assert report.functions[0].scores.mean > 0.5 > report.functions[1].scores.mean  # type: ignore[operator]
    again = test_rewards(
        {"format": countdown.format_reward, "equation": countdown.equation_reward},
        countdown.rows("train", 6),
        base_model="countdown-tiny",
        rows=4,
        config={"num_generations": 8, "effective_batch_size": 8, "sampling_params": {"max_tokens": 96}},
    )
    assert again.total == report.total, "the same seed draws the same completions"
    assert "sampling 4 x 8 completions from countdown-tiny" in capsys.readouterr().err
