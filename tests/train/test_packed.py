"""Packs by hand, and how a batch is divided into them."""

import pytest
import torch

from rewardsmith.rollout.sampling import Support
from rewardsmith.train.batch import Example
from rewardsmith.train.fast.packed import Segment, length, pack, split


def example(prompt: list[int], completion: list[int], support: Support | None = None) -> Example:
    return Example(prompt, completion, 1.0, 1.0, [0.0] * len(completion), support)


def test_a_pack_by_hand():
    a, b = [10, 11, 12], [20]
    examples = [example(a, [1, 2, 3]), example(b, [4, 5]), example(a, [6]), example(a, [7, 8])]
    made = pack(examples, [0, 2, 3, 1])
    assert made.ids_R.tolist() == [10, 11, 12, 1, 2, 7, 20, 4]
    assert made.positions_R.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert made.segments == [
        Segment(0, 3),
        Segment(3, 5, 0, 3),
        Segment(5, 6, 0, 3),
        Segment(6, 7),
        Segment(7, 8, 6, 7),
    ]
    # The prompt's last row comes first and predicts three first tokens; 10 and 11 predict nothing.
    assert made.predicting_P.tolist() == [2, 3, 4, 5, 6, 7]
    assert made.source_N.tolist() == [0, 1, 2, 0, 0, 3, 4, 5]
    assert made.targets_N.tolist() == [1, 2, 3, 6, 7, 8, 4, 5]
    assert (made.places, made.lengths, made.support) == ([0, 2, 3, 1], [3, 1, 2, 2], None)


def test_the_row_before_a_target_holds_the_token_before_it():
    examples = [example([1, 2], [3, 4, 5]), example([1, 2], [6]), example([7], [8, 9])]
    made = pack(examples, [0, 1, 2])
    before = made.ids_R[made.predicting_P[made.source_N]]
    assert before.tolist() == [2, 3, 4, 2, 7, 8]


def test_supports_are_laid_end_to_end():
    one = Support.of([torch.tensor([1, 2]), torch.tensor([3])])
    two = Support.of([torch.tensor([4, 5, 6])])
    made = pack([example([9], [1, 3], one), example([9], [5], two)], [1, 0]).support
    assert made.ids.tolist() == [4, 5, 6, 1, 2, 3]
    assert made.offsets.tolist() == [0, 3, 5, 6]


def batch() -> list[Example]:
    lengths = {(1, 2, 3): [5, 1, 9, 2], (4,): [1, 1], (5, 6): [30], (7, 8, 9, 10): [3, 3, 3]}
    return [example(list(prompt), [0] * n) for prompt, counts in lengths.items() for n in counts]


@pytest.mark.parametrize("rows", [1, 4, 10, 17, 40, 1000])
def test_no_part_is_larger_than_asked_unless_one_example_is(rows: int):
    examples = batch()
    parts = split(examples, range(len(examples)), rows)
    assert sorted(place for part in parts for place in part) == list(range(len(examples)))
    for part in parts:
        size = len(pack(examples, part).ids_R)
        assert size <= rows or (len(part) == 1 and size == length(examples[part[0]]) > rows)


def test_a_group_stays_whole_where_it_fits_and_is_sorted_by_length():
    examples = batch()
    assert split(examples, range(10), 1000) == [[2, 0, 3, 1, 4, 5, 6, 7, 8, 9]]
    # 3 + 13 rows, 1, 31, 4 + 6: the second group fits beside the first one, the others do not.
    assert split(examples, range(10), 17) == [[2, 0, 3, 1, 4, 5], [6], [7, 8, 9]]


def test_examples_of_one_prompt_are_one_group_wherever_they_stand():
    examples = [example([1, 2], [3, 4]), example([9], [3]), example([1, 2], [5, 6, 7])]
    assert split(examples, [0, 1, 2], 100) == [[2, 0, 1]]
    assert split(examples, [1, 2], 100) == [[1, 2]]
    assert split(examples, [], 100) == []
    assert len(pack(examples, [2, 0, 1]).ids_R) == 2 + 2 + 1 + 1


def test_a_large_group_is_divided_evenly():
    examples = [example([1] * 10, [0] * 11) for _ in range(8)]
    # 10 rows of completions each; four beside the prompt's 10 in 50 rows, not 4 and then what is left.
    assert [len(part) for part in split(examples, range(8), 60)] == [4, 4]
    assert [len(part) for part in split(examples, range(6), 60)] == [3, 3]
