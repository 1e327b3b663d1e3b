import random
from collections import Counter

import pytest

from rewardsmith.errors import DatasetError
from rewardsmith.rollout.prompts import Prompt
from rewardsmith.train.data import EVAL_ROWS, Batches, read_rows, split_rows


def rows(count: int, **columns) -> list:
    return [(i, {"prompt": str(i), **columns}) for i in range(count)]


def numbers(part: list) -> list[int]:
    return [number for number, _ in part]


def test_rows_keep_their_types_and_numbers():
    content = b'{"prompt": "a\xe2\x80\xa8b", "x": [1, null]}\n\n{"prompt": "c", "x": 1.5}\n'
    assert read_rows(content) == [(0, {"prompt": "a\u2028b", "x": [1, None]}), (1, {"prompt": "c", "x": 1.5})]


def test_the_split_column_decides():
    mixed = [(0, {"split": "train"}), (1, {"split": "evaluation"}), (2, {}), (3, {"split": "evaluation"})]
    train, held_out = split_rows(mixed, eval_fraction=0.5, seed=0)
    assert (numbers(train), numbers(held_out)) == ([0, 2], [1, 3])


def test_a_fraction_is_drawn_by_the_seed():
    parts = [split_rows(rows(40), 0.25, seed) for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2]
    for train, held_out in parts:
        assert sorted(numbers(train) + numbers(held_out)) == list(range(40))
    shares = [len(split_rows(rows(40), 0.25, seed)[1]) / 40 for seed in range(200)]
    assert sum(shares) / 200 == pytest.approx(0.25, abs=0.02)


def test_a_fraction_holds_out_prompts_and_not_rows():
    repeated = [(i, {"prompt": f"p{i % 10}"}) for i in range(100)]
    for seed in range(20):
        sides = [{row["prompt"] for _, row in side} for side in split_rows(repeated, 0.2, seed)]
        assert all(sides) and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10


def test_a_prompts_side_does_not_depend_on_the_other_rows():
    few, many = split_rows(rows(50), 0.25, 3)[1], split_rows(rows(200), 0.25, 3)[1]
    assert numbers(few) == [number for number in numbers(many) if number < 50] and few


def test_a_fraction_leaves_a_row_on_each_side_when_there_are_two_prompts():
    for seed in range(50):
        for fraction in (0.001, 0.5):
            train, held_out = split_rows(rows(2), fraction, seed)
            assert len(train) == len(held_out) == 1
    assert split_rows(rows(1), 0.5, 0) == (rows(1), [])
    assert split_rows(rows(9), 0.0, 0) == (rows(9), [])


def test_half_a_surrogate_pair_has_a_side_too():
    odd = [(0, {"prompt": "a\ud800"}), (1, {"prompt": "a"})]
    assert all(split_rows(odd, 0.5, 0))


def test_no_more_than_the_limit_is_evaluated_and_the_rest_is_not_trained_on():
    train, held_out = split_rows(rows(2000), 0.5, seed=0)
    assert 900 < len(train) < 1100 and len(held_out) == EVAL_ROWS
    assert not set(numbers(train)) & set(numbers(held_out))


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(DatasetError, match="all are held out"):
        split_rows(rows(3, split="evaluation"), 0, 0)


def batches(count: int, per_step: int, seed: int = 0) -> Batches:
    return Batches([Prompt(i, "", [1], {}) for i in range(count)], per_step, seed)


def test_every_epoch_takes_every_row_once_in_another_order():
    taken = [prompt.row for step in range(1, 11) for prompt in batches(10, 3).take(step)]
    epochs = [taken[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_is_a_function_of_seed_and_number():
    assert batches(10, 3).take(7) == batches(10, 3).take(7)
    assert batches(10, 3, seed=0).take(1) != batches(10, 3, seed=1).take(1)


def test_a_step_may_take_more_prompts_than_there_are_rows():
    assert sorted(Counter(prompt.row for prompt in batches(2, 5).take(1)).values()) == [2, 3]


def test_epochs_are_counted_in_rows():
    assert (batches(10, 4).epoch(5), batches(10, 4).steps_per_epoch) == (2.0, 3)


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch):
    shuffled = []

    class Counting(random.Random):
        def shuffle(self, x) -> None:
            shuffled.append(len(x))
            super().shuffle(x)

    monkeypatch.setattr(random, "Random", Counting)
    long = batches(1000, 16, seed=77)
    for step in range(1, 64):  # 1008 prompts: the last step reaches into the second epoch
        long.take(step)
    assert shuffled == [1000, 1000]
