"""The Countdown task: parts that share no problem, rows in the documented form, rewards that judge correctly."""

import importlib.util
import inspect
import json
from pathlib import Path

import pytest

from rewardsmith.demo import countdown
from rewardsmith.errors import ConfigError

SHARED = Path(__file__).parents[3] / "shared"
SPLITS = ("warm_start", "train", "held_out")


def documented_rewards():
    source = SHARED / "acceptance/seed_rewards.py"
    if not source.exists():
        pytest.skip("needs the documented reward functions in ../shared/acceptance")
    spec = importlib.util.spec_from_file_location("seed_rewards", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.format_reward_func, module.equation_reward_func


def solved(row):
    attempts = countdown.attempts(tuple(sorted(row["nums"])))
    solution = next(attempt for attempt in attempts if attempt.value == row["target"])
    return f"<think>\n{', '.join(solution.steps)}\n</think>\n<answer> {solution.expression} </answer>"


def test_no_problem_is_in_two_parts():
    parts = {split: set(countdown.problems(split, 2) + countdown.problems(split, 3)) for split in SPLITS}
    assert min(len(part) for part in parts.values()) > 1000
    assert sum(len(part) for part in parts.values()) == len(set().union(*parts.values()))


def test_rows_of_different_parts_share_no_problem_in_any_order_of_the_numbers():
    seen = [
        {(tuple(sorted(row["nums"])), row["target"]) for row in countdown.rows(split, 300, seed)}
        for split in SPLITS
        for seed in (0, 1)
    ]
    for one in (0, 1):
        for other in (2, 3):
            assert not seen[one] & seen[other]
            assert not seen[one] & seen[other + 2]
            assert not seen[other] & seen[one + 4]


def test_the_part_of_a_problem_never_changes():
    # The embedded model was trained on the first of these parts: another hash would put it into the held-out rows.
    problems = [([3, 8], 11), ([8, 3], 24), ([2, 7, 9], 5), ([25, 4], 100), ([1, 1, 12], 13), ([6, 10], 4)]
    assert [countdown.split_of(nums, target) for nums, target in problems] == PINNED
    assert countdown.split_of([8, 3], 11) == countdown.split_of((3, 8), 11)


PINNED = ["warm_start", "train", "warm_start", "train", "held_out", "warm_start"]


def test_rows_are_different_typed_and_the_same_each_time():
    made = countdown.rows("train", 200, seed=3)
    assert made == countdown.rows("train", 200, seed=3)
    assert made != countdown.rows("train", 200, seed=4)
    assert len({(tuple(sorted(row["nums"])), row["target"]) for row in made}) == 200
    assert sum(len(row["nums"]) == 3 for row in made) == 80
    for row in made:
        assert type(row["nums"]) is list and type(row["target"]) is int
        assert 1 <= row["target"] <= 100
        assert f"the numbers {row['nums']}, create an equation that equals {row['target']}. " in row["prompt"]
    assert {row["split"] for row in made} == {"train"}
    assert {row["split"] for row in countdown.rows("held_out", 20)} == {"evaluation"}


def test_more_rows_than_problems_is_refused_with_the_number_there_is():
    with pytest.raises(ConfigError, match="held_out part holds"):
        countdown.rows("held_out", 100_000)


def test_prompts_have_the_documented_wording():
    data = SHARED / "data/countdown/countdown_2000.jsonl"
    if not data.exists():
        pytest.skip("needs the documented rows in ../shared/data/countdown")
    for line in data.read_text().splitlines()[:200]:
        row = json.loads(line)
        assert countdown.prompt(row["nums"], row["target"]) == row["prompt"]
        assert countdown.equation_reward("", f"<answer>{row['solution']}</answer>", row) == 1


def test_attempts_say_what_is_true_and_use_every_number_once():
    for nums in ((3, 8), (7, 7), (2, 5, 9), (4, 4, 12), (3, 8, 21, 50)):
        attempts = countdown.attempts(nums)
        assert len({attempt.value for attempt in attempts}) == len(attempts)
        for attempt in attempts:
            assert len(attempt.steps) == len(nums) - 1
            for step in attempt.steps:
                left, right = step.split(" = ")
                assert eval(left) == int(right)
            answer = f"<answer> {attempt.expression} </answer>"
            assert countdown.equation_reward("", answer, {"nums": list(nums), "target": attempt.value}) == 1


def test_solved_rows_earn_full_marks_from_our_rewards_and_the_documented_ones():
    format_documented, equation_documented = documented_rewards()
    for row in countdown.rows("held_out", 100):
        completion = solved(row)
        for reward in (
            countdown.format_reward,
            countdown.equation_reward,
            format_documented,
            equation_documented,
        ):
            assert reward(row["prompt"], completion, row) == 1.0


COMPLETIONS = [
    "<think>\n3 + 8 = 11: yes\n</think>\n<answer> 3 + 8 </answer>",
    "<think></think>\n<answer>8+3</answer>",
    "<think>a < b</think>\n<answer>(3 + 8)</answer>",
    "<think>\n3 + 8 = 11\n</think><answer> 3 + 8 </answer>",
    "<think>\n3 + 8 = 11\n</think>\n<answer> 3 + 8 </answer> done",
    "so <think>\n3 + 8 = 11\n</think>\n<answer> 3 + 8 </answer>",
    "<think><think></think>\n<answer> 3 + 8 </answer>",
    "<think>\n3 + 8 = 11\n</think>\n<answer> 3 + 8",
    "<think>x</think>\n<answer> 3 + 8 = 11 </answer>",
    "<think>x</think>\n<answer> 3 + 8 + 0 </answer>",
    "<think>x</think>\n<answer> 3 * 8 </answer>",
    "<think>x</think>\n<answer> 38 </answer>",
    "<think>x</think>\n<answer> 3 + </answer>",
    "<think>x</think>\n<answer> 8 / (3 - 3) </answer>",
    "<think>x</think>\n<answer> __import__('os') </answer>",
    "<think>x</think>\n<answer></answer>",
    "",
]


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_our_rewards_agree_with_the_documented_ones(completion):
    format_documented, equation_documented = documented_rewards()
    for example in ({"nums": [8, 3], "target": 11}, {"nums": "[3, 8]", "target": "11"}):
        assert countdown.format_reward("", completion, example) == format_documented("", completion, example)
        assert countdown.equation_reward("", completion, example) == equation_documented("", completion, example)


def test_divisions_in_fractions_count():
    assert countdown.equation_reward("", "<answer>8 / (3 / 6)</answer>", {"nums": [3, 6, 8], "target": 16}) == 1


def test_powers_are_not_basic_arithmetic_and_cost_no_time():
    example = {"nums": [9, 9, 9, 9], "target": 1}
    assert countdown.equation_reward("", "<answer>9 ** 9 ** 9 ** 9</answer>", example) == 0


def test_rewards_travel_as_text():
    for reward in (countdown.format_reward, countdown.equation_reward):
        alone: dict = {}
        exec(inspect.getsource(reward), alone)
        assert alone[reward.__name__]("", COMPLETIONS[0], {"nums": [3, 8], "target": 11}) == 1.0
