"""Trained completions packed for one pass through the model: no padding, and each prompt only once.

The examples of one prompt are a group: the prompt's tokens, then those of its completions, end to end. A completion's
last token predicts nothing and is not fed; its first one is predicted by the prompt's last row, which all completions
of the group share. How rows may see each other is `attention`'s business, the loss is `head`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rewardsmith.rollout.sampling import Support
    from rewardsmith.train.batch import Example


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of a pack, consecutive tokens of one sequence: a prompt, or a completion after one.

    A completion also sees the rows `prompt_start` to `prompt_stop`; a prompt has none.
    """

    start: int
    stop: int
    prompt_start: int = 0
    prompt_stop: int = 0

    @property
    def prompt_length(self) -> int:
        return self.prompt_stop - self.prompt_start


@dataclass(frozen=True)
class Pack:
    """R rows to feed and the N tokens they predict, completion after completion.

    `places` are those of the examples, in the order of the targets, `lengths` their numbers of targets. `predicting_P`
    lists the rows whose hidden states predict anything, `source_N` says which of these predicts target n.
    """

    places: list[int]
    lengths: list[int]
    ids_R: Tensor
    positions_R: Tensor
    segments: list[Segment]
    predicting_P: Tensor
    source_N: Tensor
    targets_N: Tensor
    support: Support | None

    def to(self, device: torch.device) -> Pack:
        """Moves what the model computes with; segments and support stay where they are."""
        if device.type == "cpu":
            return self
        names = ("ids_R", "positions_R", "predicting_P", "source_N", "targets_N")
        return Pack(**(vars(self) | {name: getattr(self, name).to(device) for name in names}))


def fed(example: Example) -> int:
    """Rows that a completion takes beside its prompt."""
    return len(example.completion) - 1


def length(example: Example) -> int:
    """Rows that an example takes alone."""
    return len(example.prompt) + fed(example)


def split(examples: Sequence[Example], places: Sequence[int], rows: int) -> list[list[int]]:
    """The examples at `places` as micro-batches of at most `rows` rows, or of one example that has more.

    A group that does not fit is divided by completions into parts of about equal size, its prompt repeated in each.
    Completions of a group are sorted by length, so that those computed together are alike. Depends on nothing but the
    examples and `rows`.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place in places:
        groups.setdefault(tuple(examples[place].prompt), []).append(place)
    parts: list[list[int]] = []
    used = rows
    for prompt, members in groups.items():
        members = sorted(members, key=lambda place: -fed(examples[place]))
        for piece in _pieces(examples, members, max(rows - len(prompt), 0)):
            size = len(prompt) + sum(fed(examples[place]) for place in piece)
            if used + size > rows or not parts:
                parts.append([])
                used = 0
            parts[-1] += piece
            used += size
    return parts


def _pieces(examples: Sequence[Example], members: Sequence[int], room: int) -> list[list[int]]:
    """A group cut so that the completions of each piece take at most `room` rows, or are one."""
    whole = sum(fed(examples[place]) for place in members)
    if whole <= room:
        return [list(members)]
    fair = whole / ceil(whole / room) if room else 0
    pieces: list[list[int]] = []
    used = 0
    for place in members:
        rows = fed(examples[place])
        if not pieces or used + rows > room or used >= fair:
            pieces.append([])
            used = 0
        pieces[-1].append(place)
        used += rows
    return pieces


def pack(examples: Sequence[Example], places: Sequence[int]) -> Pack:
    """One micro-batch; examples of one prompt have to stand together, or the prompt is computed again."""
    ids: list[list[int]] = []
    positions: list[range] = []
    segments: list[Segment] = []
    predicting: list[range] = []
    source: list[int] = []
    rows = predictors = 0
    prompt: list[int] | None = None
    for place in places:
        example = examples[place]
        if example.prompt != prompt:
            prompt = example.prompt
            first, after = rows, rows + len(prompt)
            ids.append(prompt)
            positions.append(range(len(prompt)))
            segments.append(Segment(first, after))
            predicting.append(range(after - 1, after))
            last_of_prompt, rows, predictors = predictors, after, predictors + 1
        count = fed(example)
        source.append(last_of_prompt)
        if count:
            ids.append(example.completion[:-1])
            positions.append(range(len(prompt), len(prompt) + count))
            segments.append(Segment(rows, rows + count, first, after))
            predicting.append(range(rows, rows + count))
            source += range(predictors, predictors + count)
            rows, predictors = rows + count, predictors + count
    return Pack(
        places=list(places),
        lengths=[len(examples[place].completion) for place in places],
        ids_R=_flat(ids),
        positions_R=_flat(positions),
        segments=segments,
        predicting_P=_flat(predicting),
        source_N=torch.tensor(source),
        targets_N=_flat([examples[place].completion for place in places]),
        support=_support([examples[place].support for place in places]),
    )


def _flat(parts: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(parts)), dtype=torch.long)


def _support(supports: Sequence[Support | None]) -> Support | None:
    """Of all targets; None when no draw was cut."""
    known = [support for support in supports if support is not None]
    if not known:
        return None
    assert len(known) == len(supports), "the completions of a step are drawn with the same sampling parameters"
    counts_N = torch.cat([support.offsets.diff() for support in known])
    offsets = torch.nn.functional.pad(counts_N.cumsum(0), (1, 0))
    return type(known[0])(torch.cat([support.ids for support in known]), offsets)
