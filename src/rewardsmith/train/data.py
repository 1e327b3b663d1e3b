"""The rows of a job: which are trained on, which are held out, and in what order they come.

Rows are numbered as they stand in the dataset. Everything here is a function of the rows and the seed, so a resumed
job takes up the same rows in the same order.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rewardsmith.errors import DatasetError
from rewardsmith.rollout.prompts import Prompt

NumberedRow = tuple[int, dict[str, Any]]

# Held-out rows that an evaluation scores, one completion each: a mean of 256 zeros and ones is known to 0.03.
EVAL_ROWS = 256


def read_rows(content: bytes) -> list[NumberedRow]:
    """Rows of a registered dataset: JSON lines, checked when it was uploaded."""
    return list(enumerate(json.loads(line) for line in content.splitlines() if line.strip()))


def split_rows(rows: list[NumberedRow], eval_fraction: float, seed: int) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """(rows to train on, rows to evaluate on). A `split` column decides (contract 2.1), else prompts by `seed`.

    With `eval_fraction` rows of the same prompt are on one side, and a prompt's side depends on nothing but its text
    and the seed: a run that continues another one inherits the seed and so holds out the same prompts, unless the user
    sets another seed. Held-out rows are never trained on; at most EVAL_ROWS of them are evaluated. Raises DatasetError
    when no row is left to train on.
    """
    if any("split" in row for _, row in rows):
        held_out = {number for number, row in rows if row.get("split") == "evaluation"}
    else:
        prompts = _held_out_prompts({row["prompt"] for _, row in rows}, eval_fraction, seed)
        held_out = {number for number, row in rows if row["prompt"] in prompts}
    train = [row for row in rows if row[0] not in held_out]
    evaluated = [row for row in rows if row[0] in held_out]
    if not train:
        raise DatasetError(f"none of the dataset's {len(rows)} rows is left to train on: all are held out")
    if len(evaluated) > EVAL_ROWS:
        evaluated = sorted(random.Random(f"{seed}/evaluated").sample(evaluated, EVAL_ROWS), key=lambda row: row[0])
    return train, evaluated


def _held_out_prompts(prompts: set[str], fraction: float, seed: int) -> set[str]:
    """Those whose place on 0 to 1 is below `fraction`; at least one, and not all, where there are two."""
    if not fraction or len(prompts) < 2:
        return set()
    place = {prompt: _place(f"{seed}/held out/{prompt}") for prompt in prompts}
    in_order = sorted(prompts, key=lambda prompt: place[prompt])
    count = sum(value < fraction for value in place.values())
    return set(in_order[: min(max(count, 1), len(prompts) - 1)])


def _place(text: str) -> float:
    """A number from 0 to 1 by the hash of `text`, which JSON may have given halves of surrogate pairs."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8]) / 2**64


@dataclass(frozen=True)
class Batches:
    """Which prompts each step takes: every epoch is a new shuffle, and a step may reach into the next epoch."""

    prompts: Sequence[Prompt]
    per_step: int
    seed: int

    def take(self, step: int) -> list[Prompt]:
        """The prompts of `step`, counted from 1."""
        start = (step - 1) * self.per_step
        chosen = []
        for place in range(start, start + self.per_step):
            epoch, index = divmod(place, len(self.prompts))
            chosen.append(self.prompts[_order(len(self.prompts), self.seed, epoch)[index]])
        return chosen

    def epoch(self, step: int) -> float:
        """Passes over the rows when `step` is done."""
        return step * self.per_step / len(self.prompts)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.prompts) // self.per_step)


@lru_cache(maxsize=2)  # a step reaches from one epoch into the next
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/epoch {epoch}").shuffle(order)
    return order
