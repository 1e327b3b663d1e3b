"""Countdown: join the given numbers with + - * / so that they equal a target. The task of the embedded demo.

It holds the problem space, its division into three parts that share no problem, dataset rows in the prompt form of
the documentation, and the two reward functions. Standard library only; it trains nothing and loads no model.
`scripts/build_demo_model.py` draws the warm start from here, the demo and the examples draw their rows from here.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, combinations_with_replacement
from typing import Any, Literal

from rewardsmith.errors import ConfigError

Split = Literal["warm_start", "train", "held_out"]
Numbers = tuple[int, ...]
Term = tuple[int, str]  # a value and the expression that makes it

# Parts of twenty by stable hash. Half of the space is never seen by the base model.
_SHARE: dict[Split, range] = {"warm_start": range(10), "train": range(10, 15), "held_out": range(15, 20)}

# Count of numbers in a problem -> the largest number in it. Two numbers give few problems each, so they may be larger.
LARGEST_NUMBER = {2: 25, 3: 12}
LARGEST_TARGET = 100
# No step of a solution goes above this: the tokenizer of the embedded model has one token for each value up to here.
LARGEST_VALUE = 199

_PROMPT = """\
<|im_start|>system
You are a helpful assistant. You first think about the reasoning process step by step
and then provide the user with an answer.<|im_end|>
<|im_start|>user
Using the numbers {nums}, create an equation that equals {target}. You can use
basic arithmetic operations (+, -, *, /) and parentheses, and each number can only
be used once. Show your work in <think> </think> tags. And return the final equation
and answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.<|im_end|>
<|im_start|>assistant
Let me solve this step by step.
"""


@dataclass(frozen=True)
class Attempt:
    """One way of joining all numbers: `steps` such as ("3 + 8 = 11", "11 * 2 = 22"), then what they amount to."""

    steps: tuple[str, ...]
    expression: str
    value: int


def prompt(nums: Numbers | list[int], target: int) -> str:
    return _PROMPT.format(nums=list(nums), target=target)


def split_of(nums: Numbers | list[int], target: int) -> Split:
    """The part a problem belongs to, whatever the order of its numbers, on every machine and in every run."""
    problem = f"{sorted(nums)} = {target}"
    part = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8], "big") % 20
    return next(split for split, parts in _SHARE.items() if part in parts)


@lru_cache(maxsize=4096)
def attempts(nums: Numbers) -> tuple[Attempt, ...]:
    """One attempt for each value that `nums` can be joined to, each number used once, every step from 0 to 199.

    A solvable problem has a solution without negative steps, so none are taken.
    """
    found: dict[int, Attempt] = {}
    for attempt in _join([(number, str(number)) for number in sorted(nums)], ()):
        found.setdefault(attempt.value, attempt)
    return tuple(found.values())


def _join(terms: list[Term], steps: tuple[str, ...]) -> Iterator[Attempt]:
    if len(terms) == 1:
        value, expression = terms[0]
        # The outermost parentheses are not needed.
        yield Attempt(steps, expression[1:-1] if steps else expression, value)
    for i, j in combinations(range(len(terms)), 2):
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for left, operator, right, value in _pairings(terms[i], terms[j]):
            step = f"{left[0]} {operator} {right[0]} = {value}"
            joined = (value, f"({left[1]} {operator} {right[1]})")
            yield from _join([*rest, joined], (*steps, step))


def _pairings(one: Term, other: Term) -> list[tuple[Term, str, Term, int]]:
    large, small = (one, other) if one[0] >= other[0] else (other, one)
    a, b = large[0], small[0]
    results = [(one, "+", other, a + b), (large, "-", small, a - b), (one, "*", other, a * b)]
    if b and a % b == 0:
        results.append((large, "/", small, a // b))
    return [result for result in results if result[3] <= LARGEST_VALUE]


@lru_cache(maxsize=8)
def problems(split: Split, count_of_numbers: int) -> tuple[tuple[Numbers, int], ...]:
    """All solvable (nums, target) of one part, in a fixed order, with sorted numbers and targets from 1 to 100."""
    largest = LARGEST_NUMBER[count_of_numbers]
    return tuple(
        (nums, target)
        for nums in combinations_with_replacement(range(1, largest + 1), count_of_numbers)
        for target in sorted({attempt.value for attempt in attempts(nums)} & set(range(1, LARGEST_TARGET + 1)))
        if split_of(nums, target) == split
    )


def rows(split: Split, count: int, seed: int = 0, three_numbers: float = 0.4) -> list[dict[str, Any]]:
    """`count` different problems of one part as dataset rows: prompt, nums, target, split.

    A share of `three_numbers` has three numbers, the others two. The split column says "evaluation" for held-out
    problems and "train" for the others. Raises ConfigError if the part holds fewer problems than asked for.
    """
    rng = random.Random(f"{split} {seed}")
    with_three = round(count * three_numbers)
    chosen = []
    for count_of_numbers, wanted in ((2, count - with_three), (3, with_three)):
        pool = problems(split, count_of_numbers)
        if wanted > len(pool):
            raise ConfigError(
                f"{wanted} problems with {count_of_numbers} numbers asked for, but the {split} part holds "
                f"{len(pool)}: ask for fewer rows or change the share of problems with three numbers"
            )
        chosen += rng.sample(pool, wanted)
    rng.shuffle(chosen)
    column = "evaluation" if split == "held_out" else "train"
    made = []
    for nums, target in chosen:
        shown = rng.sample(nums, len(nums))
        made.append({"prompt": prompt(shown, target), "nums": shown, "target": target, "split": column})
    return made


def format_reward(prompt: str, completion: str, example: dict[str, object]) -> float:
    """1 for exactly one think block, a line break and an answer block at the end of the completion."""
    import re

    thought = r"(?:(?!</?think>).)*"
    return float(bool(re.match(rf"<think>{thought}</think>\n<answer>.*</answer>$", completion, re.DOTALL)))


def equation_reward(prompt: str, completion: str, example: dict[str, object]) -> float:
    """1 if the first answer block holds an expression in + - * / that uses each number once and equals the target."""
    import ast
    import operator
    import re

    operators = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
    }

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return float(operators[type(node.op)](value(node.left), value(node.right)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        raise ValueError("not basic arithmetic")

    answer = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    if answer is None:
        return 0.0
    expression = answer[1].strip()
    if not re.fullmatch(r"[\d\s().+*/-]+", expression):
        return 0.0
    nums = ast.literal_eval(str(example["nums"]))  # a list, or the text of one from a CSV file
    if sorted(int(digits) for digits in re.findall(r"\d+", expression)) != sorted(nums):
        return 0.0
    try:
        reached = value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return 0.0
    return float(abs(reached - float(str(example["target"]))) < 1e-5)
