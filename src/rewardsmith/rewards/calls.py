"""Calls of reward functions: what one asks, which of them travel together, which have to run by themselves.

A call is one function on one completion, or on all completions of a prompt. Ordinary ones go out in chunks, grouped by
prompt. One that ended its executor, or whose chunk broke the protocol, runs again alone in a fresh executor; where more
than one call may have done it, alone in the whole pool. Data and rules only: `pool` acts on them.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rewardsmith.rewards.inside import frames

TRIES = 2  # executors that one call may end
MAX_CHUNK = 64
MAX_CHUNK_CHARACTERS = 2**20
CHUNK_SECONDS = 0.002  # of work that a chunk should be at least, so that handing it out does not cost more


@dataclass(frozen=True)
class Group:
    """The completions of one prompt. `example` is the dataset's row, JSON types only."""

    prompt: str
    example: dict[str, Any]
    completions: Sequence[str]


class Prompt:
    """The part of an order that the calls of one group share, as JSON."""

    def __init__(self, group: Group) -> None:
        self.head = f"{json.dumps(group.prompt)},{json.dumps(group.example)}"


@dataclass(eq=False, slots=True)
class Call:
    """`texts` is a completion, or all of the group. `places` says where the results belong; a probe has none.

    `alone`: it may not share an executor with another call. `exclusive`: nor run while another does.
    """

    prompt: Prompt
    texts: str | list[str]
    function: int
    places: list[tuple[int, int, int]]
    together: bool = False
    alone: bool = False
    exclusive: bool = False
    killed: int = 0

    @property
    def count(self) -> int:
        return 1 if isinstance(self.texts, str) else len(self.texts)

    @property
    def characters(self) -> int:
        return len(self.texts) if isinstance(self.texts, str) else sum(map(len, self.texts))

    def probe(self) -> Call:
        """The same question once more, whose answer is no score."""
        return Call(self.prompt, self.texts, self.function, [])


@dataclass(frozen=True, slots=True)
class Result:
    """What was said of one call, or of one completion in it: by an executor, or by the pool in its place."""

    outcome: str
    value: float
    seconds: float
    prints: str = ""
    error: str = ""
    left_behind: bool = False
    worn: bool = False


@dataclass(eq=False)
class Chunk:
    """Calls that one order brings to an executor, and what has come back. The last `probes` of them are no scores.

    Ids are such that user code cannot guess them, so that a result it makes up is seen. `concurrency` calls run at a
    time; with 0, one after the other.
    """

    calls: list[Call]
    probes: int = 0
    concurrency: int = 0
    waiting: dict[int, tuple[Call, int]] = field(init=False)
    done: list[tuple[Call, int, Result]] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = secrets.randbits(62)
        slots = [(call, place) for call in self.calls for place in range(call.count)]
        self.waiting = dict(enumerate(slots, first))

    def order(self) -> bytes:
        """As `inside.worker` reads it: groups of [prompt, example, [[completion (or all), [function, ...]], ...]]."""
        groups = [
            f"[{prompt.head},["
            + ",".join(
                f"[{json.dumps(texts)},{json.dumps([call.function for call in of_texts])}]"
                for texts, of_texts in groupby(of_prompt, key=lambda call: call.texts)
            )
            + "]]"
            for prompt, of_prompt in groupby(self.calls, key=lambda call: call.prompt)
        ]
        head = f'"id":{next(iter(self.waiting))},"count":{len(self.waiting)},"concurrency":{self.concurrency}'
        return frames.order(f'{{{head},"groups":[{",".join(groups)}]}}')

    @property
    def may_be_followed(self) -> bool:
        """Whether its executor may be given more before it is done."""
        return bool(self.calls[0].places) and not self.calls[0].alone and not self.concurrency

    def is_due(self, number: int) -> bool:
        """Whether a result with this id may come now."""
        return number in self.waiting and (bool(self.concurrency) or number == next(iter(self.waiting)))

    def running(self) -> list[Call]:
        """The calls that may be running now: unfinished ones in the order in which they are started."""
        return self.unfinished()[: max(1, self.concurrency)]

    def unfinished(self) -> list[Call]:
        return list(dict.fromkeys(call for call, _ in self.waiting.values()))


class Calls:
    """The calls of one `score` that still have to be handed out."""

    def __init__(self, calls: Sequence[Call], workers: int) -> None:
        self.ordinary = deque(sorted(calls, key=lambda call: not call.together))  # those that wait for others first
        self.special: deque[list[Call]] = deque()  # each needs a fresh executor
        self.workers = workers

    def __len__(self) -> int:
        return len(self.ordinary) + len(self.special)

    def again(self, calls: Sequence[Call]) -> None:
        """They were never begun, or not brought to an end, by no fault of theirs."""
        self.ordinary.extendleft(reversed([call for call in calls if call.places and not call.alone]))
        self.special.extend([call] for call in calls if call.places and call.alone)

    def by_itself(self, call: Call) -> None:
        call.alone = True
        self.special.append([call])

    def next(self, *, fresh: bool, others: bool, largest: int, pace: float) -> list[Call]:
        """What an executor gets next, if anything. `fresh`: it has done nothing yet; `others`: another one works.

        Large chunks while there is much to do, small ones towards the end, so that all executors finish together.
        `pace` is the mean time of a call in seconds.
        """
        if self.special and self.special[0][0].exclusive:
            return self.special.popleft() if fresh and not others else []
        if self.special and fresh:
            return self.special.popleft()
        if not self.ordinary:
            return []
        share = -(-len(self.ordinary) // self.workers)
        least = share if self.ordinary[0].together else int(CHUNK_SECONDS / max(pace, 1e-6))
        size = min(largest, share, max(share // 4, least))
        chunk = [self.ordinary.popleft()]
        characters = chunk[0].characters
        while len(chunk) < size and self.ordinary and self.ordinary[0].together == chunk[0].together:
            characters += self.ordinary[0].characters
            if characters > MAX_CHUNK_CHARACTERS:
                break
            chunk.append(self.ordinary.popleft())
        return chunk

    def drain(self) -> Iterator[Call]:
        """All that is left, for an end without results."""
        while self.special:
            yield from (call for call in self.special.popleft() if call.places)
        while self.ordinary:
            yield self.ordinary.popleft()
