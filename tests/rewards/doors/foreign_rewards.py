"""Reward functions as people have them, in the styles of other trainers: imports, constants and helpers beside them.

Our own versions of the behaviours that such functions show; nothing here knows that it will travel as text.
"""

from __future__ import annotations

import ast
import asyncio
import logging
import math
import os.path as path
import random
import re
import string
import xml.etree.ElementTree
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

CLIP = 300
TAG_SHARES = {"think": 0.25, "answer": 0.75}
NUMBER = re.compile(r"-?[\d,]+(?:\.\d+)?")
STRICT = re.compile(r"^<think>(?:(?!</think>).)*</think>\s*<answer>.*</answer>$", re.DOTALL | re.IGNORECASE)
SESSION = object()
calls = 0


# ---- TRL ------------------------------------------------------------------------------------------------------------


def strict_format(completions: Sequence[Message], **kwargs: Any) -> list[float]:  # noqa: F821
    """1 for the strict form; conversations."""
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if STRICT.match(text) else 0.0 for text in texts]


def tag_shares(completions: list[str], **kwargs: Any) -> list[float]:
    def share(text: str) -> float:
        return sum(part for tag, part in TAG_SHARES.items() if f"<{tag}>" in text and f"</{tag}>" in text)

    return [share(text) for text in completions]


@lru_cache(maxsize=64)
def parsed(text: str) -> float | None:
    found = NUMBER.findall(text[-CLIP:])
    return float(found[-1].replace(",", "")) if found else None


def accuracy(completions: list[str], solution: list[str], **kwargs: Any) -> list[float | None]:
    """No opinion where the reference cannot be parsed."""
    scores: list[float | None] = []
    for text, reference in zip(completions, solution, strict=True):
        wanted = parsed(reference)
        if wanted is None:
            logger.warning("cannot parse %r", reference)
            scores.append(None)
        else:
            scores.append(float(parsed(text) == wanted))
    return scores


def with_columns(prompts, completions, nums, target, bonus=(0.0,), weight=None, log_extra=None, log_metric=None):
    """Equation with exactly the given numbers: `eval` after a check of the characters."""
    results = []
    for text, given, wanted in zip(completions, nums, target, strict=True):
        allowed = re.fullmatch(r"[\d\s+*/().-]+", text)
        used = sorted(int(digits) for digits in re.findall(r"\d+", text))
        given = ast.literal_eval(given) if isinstance(given, str) else given
        right = bool(allowed) and used == sorted(given) and math.isclose(eval(text, {"__builtins__": None}, {}), wanted)
        results.append(float(right) + bonus[0])
    if log_extra:
        log_extra("used", [sum(map(len, completions))])
        log_metric("mean", sum(results) / len(results))
    return results


async def later(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


def ranked(completions, **kwargs):
    """The longest of the group 1, the others less, by numpy."""
    order = np.argsort(np.argsort([len(text) for text in completions]))
    return (order / max(1, len(completions) - 1)).tolist()


def by_progress(completions, trainer_state=None, **kwargs):
    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]


def by_progress_inside(completions, **kwargs):
    return [kwargs["trainer_state"].global_step for _ in completions]


def by_tokens(completions, completion_ids, **kwargs):
    return [-float(len(ids)) for ids in completion_ids]


def cosine(longest: float, low: float = 0.5, high: float = 1.0, unit: object = None) -> Any:
    """A factory: the function inside leans on its arguments. Correct answers earn more the shorter they are."""

    def scaled(completions, solution, **kwargs):
        rewards = []
        for text, reference in zip(completions, solution, strict=True):
            progress = min(1.0, len(text.split()) / longest)
            value = low + 0.5 * (high - low) * (1 + math.cos(math.pi * progress))
            rewards.append(value if reference in text else -value)
        return rewards

    def with_unit(completions, **kwargs):
        return [unit for _ in completions]

    return with_unit if unit else scaled


def wrong_length(completions, **kwargs):
    return [1.0, 2.0, 3.0]


# ---- verl -----------------------------------------------------------------------------------------------------------


def extract_solution(text: str, method: str) -> str | None:
    text = text[-CLIP:]
    if method == "strict":
        found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    else:
        found = [number for number in NUMBER.findall(text) if number not in ("", ".")]
    return found[-1].replace(",", "").replace("$", "") if found else None


def gsm8k_score(solution_str, ground_truth, method="strict", format_score=0.0, score=1.0):
    answer = extract_solution(solution_str, method)
    if answer is None:
        return 0
    return score if answer == ground_truth else format_score


def last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 7 : place]
    return None


class Normal:
    """How an answer is written when nothing but its value counts."""

    removed = ("\\text", "\\!", "$", " ")

    @classmethod
    def of(cls, text: str) -> str:
        for part in cls.removed:
            text = text.replace(part, "")
        return re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text).strip(string.punctuation.replace("}", ""))


def boxed_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **kwargs):
    found = last_boxed(solution_str)
    acc = found is not None and Normal.of(found) == Normal.of(ground_truth)
    return {"score": 1.0 if acc else -1.0, "acc": acc, "pred": found, "source": data_source}


def em_score(data_source, solution_str, ground_truth, extra_info=None):
    """Any of a list of answers, without case, articles and signs; a spammed tag costs."""

    def normal(text):
        words = "".join(" " if sign in string.punctuation else sign for sign in text.lower()).split()
        return [word for word in words if word not in {"a", "an", "the"}]

    answers = re.findall(r"<answer>(.*?)</answer>", solution_str, re.DOTALL)
    if not answers:
        return 0
    hit = any(normal(answers[-1]) == normal(target) for target in ground_truth["target"])
    return float(hit) / (4 if len(answers) > 1 else 1)


def f1_score(data_source, solution_str, ground_truth, extra_info=None):
    given, wanted = Counter(solution_str.lower().split()), Counter(ground_truth.lower().split())
    return 2 * (given & wanted).total() / max(1, given.total() + wanted.total())


def choice_score(data_source, solution_str, ground_truth, extra_info):
    choices = extra_info["choices"]
    letter = string.ascii_uppercase[choices.index(ground_truth)]
    return float(solution_str.strip() in (letter, ground_truth))


def constraints_score(data_source, solution_str, ground_truth, extra_info=None):
    checks = {
        "no_commas": lambda text, **_: "," not in text,
        "most_words": lambda text, most, **_: len(text.split()) <= most,
        "ends_with": lambda text, ending, **_: text.endswith(ending),
    }
    asked = zip(extra_info["ids"], extra_info["arguments"], strict=True)
    return sum(checks[name](solution_str, **arguments) for name, arguments in asked) / len(extra_info["ids"])


async def remote_score(data_source, solution_str, ground_truth, extra_info=None, *, url, tries=3):
    """Asked over a network that is not there: tries, and then raises."""
    for number in range(tries):
        await asyncio.sleep(0)
        if url == "good" and number == tries - 1:
            return 0.5
    raise ConnectionError(f"no answer of {url}")


def batch_score(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):
    return [
        {"score": float(text == reference), "length": len(text), **kwargs}
        for text, reference in zip(solution_strs, ground_truths, strict=True)
    ]


# ---- verifiers ------------------------------------------------------------------------------------------------------


def correct_answer(completion, answer, **kwargs) -> float:
    return 1.0 if completion[-1]["content"].strip() == answer else 0.0


def with_info(prompt, completion: str, info: dict, task: str, difficulty: float, hint: str = "none") -> float:
    return info["points"] * difficulty + len(prompt) + (task == "sums") * 100 + (hint == "none") * 1000


async def judged(prompt, completion, answer, state):
    return 1.0


def parsed_by(completion, parser, **kwargs):
    return parser.parse_answer(completion)


def remembered(completion, **kwargs):
    return kwargs.get("state")


def diversity(completions: list[str], **kwargs) -> list[float]:
    counts = Counter(completions)
    return [1 / counts[text] for text in completions]


def above_the_mean(completions, answers) -> list[float]:
    hits = [float(text == answer) for text, answer in zip(completions, answers, strict=True)]
    return [hit - sum(hits) / len(hits) for hit in hits]


def annotated_as_a_list(prompts) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


def of_a_group_by_its_result(**kwargs) -> list[float]:
    return [float(len(text)) for text in kwargs["completions"]]


def length_of(completion, **kwargs) -> float:
    return float(len(completion)) + len(kwargs)


# ---- what cannot be carried over ------------------------------------------------------------------------------------


def counting(completions, **kwargs):
    global calls
    calls += 1
    return [float(calls)] * len(completions)


def with_session(completions, **kwargs):
    return [float(hash(SESSION))] * len(completions)


def missing_helper(completions, **kwargs):
    return [normalise(text) for text in completions]  # noqa: F821


def where_am_i(completions, **kwargs):
    return [len(__file__)] * len(completions)


class Rewards:
    weight = 2.0

    def method(self, completions, **kwargs):
        return [self.weight for _ in completions]

    def __call__(self, completions, **kwargs):
        return [self.weight for _ in completions]


def twice(function):
    @wraps(function)
    def wrapper(*args, **kwargs):
        return [2 * score for score in function(*args, **kwargs)]

    return wrapper


def marked(function):
    return function


@twice
def doubled(completions, **kwargs):
    return [1.0 for _ in completions]


@marked
def with_mark(completions, **kwargs):
    return [1.0 for _ in completions]


fixed = partial(tag_shares, answer=1)


def in_order(completions, *more, **kwargs):
    return [1.0 for _ in completions]


def random_baseline(completions, **kwargs):
    return [float(random.random() < 0.5) for _ in completions]


def submodules(completions, **kwargs):
    trees = [xml.etree.ElementTree.fromstring(text) for text in completions]
    return [float(path.join(tree.tag, "x") == "a/x") for tree in trees]


@dataclass
class Weights:
    """How much each part counts."""

    right: float = 2.0
    note: str = """kept
as it is"""


def with_a_class(completions, **kwargs):
    weights = Weights()
    return [weights.right * len(weights.note) for _ in completions]


def even(number: int) -> bool:
    return number == 0 or odd(number - 1)


def odd(number: int) -> bool:
    return number != 0 and even(number - 1)


def mutual(completions, **kwargs):
    return [float(even(len(text))) for text in completions]


another_name = parsed


def aliased(completions, **kwargs):
    return [another_name(text) for text in completions]
