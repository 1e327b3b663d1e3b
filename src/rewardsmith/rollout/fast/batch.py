"""Continuous batching: requests come in at any time, join the batch between two tokens, and leave it when they end.

Requests with the same prompt share one reading of it. They are taken in the order they came, as far as slots and
memory for all that they may still say allow, so that none has to be interrupted. What is done depends on the requests
alone, not on time; free memory matters only where it is short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewardsmith.rollout.engine import Completion, Decode, check_logps, ends_in_stop, room_after, with_text
from rewardsmith.rollout.fast.attention import Rows, Tables
from rewardsmith.rollout.fast.cache import pages_for
from rewardsmith.rollout.fast.decode import Decoder, Prompt
from rewardsmith.rollout.memory import free_bytes
from rewardsmith.rollout.sampling import Cut, GrowingSupport, draw, log_probs, uniforms

if TYPE_CHECKING:
    from rewardsmith.config import SamplingParamsConfig

PROMPT_TOKENS = 4096  # read in one forward; a longer prompt is one by itself


@dataclass(frozen=True, eq=False)
class Request:
    """One completion to sample. `key` is the caller's name for it."""

    key: Hashable
    prompt: list[int]
    seed: int
    params: SamplingParamsConfig


@dataclass(frozen=True)
class Step:
    """The next token of each running request, and what ended with it. `ids_N` and `logps_N` go with `requests`."""

    requests: list[Request]
    ids_N: Tensor
    logps_N: Tensor
    finished: list[tuple[Request, Completion]]


@dataclass(eq=False)
class _Sequence:
    request: Request
    prompt: Prompt
    limit: int
    cut: Cut
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    support: GrowingSupport = field(default_factory=GrowingSupport)


class Batch:
    """`decode` is needed for text and stop strings; without it, completions have no text.

    `slots` sequences run at most; `cache_bytes` is what keys and values may take, half of the free memory when None.
    A single sequence runs in any case.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop_ids: Sequence[int],
        slots: int,
        cache_bytes: int | None = None,
        decode: Decode | None = None,
    ) -> None:
        self._decoder, self._decode, self._cache_bytes = decoder, decode, cache_bytes
        self._stop_ids = set(stop_ids)
        self._device = decoder.weights.embed_VH.device
        self._precise = torch.promote_types(decoder.weights.embed_VH.dtype, torch.float32)
        self._is_stop_V = torch.zeros(decoder.vocab, dtype=torch.bool, device=self._device)
        self._is_stop_V[[i for i in stop_ids if i < decoder.vocab]] = True
        self._slots = slots
        self._waiting: deque[_Sequence] = deque()
        self._clear()

    def _clear(self) -> None:
        """Only what waits is left, with its prompts still to be read: keeps no memory."""
        self._decoder.clear()
        self._prompts: dict[tuple[int, ...], Prompt] = {}
        for sequence in self._waiting:
            sequence.prompt = self._prompt_of(sequence.request)
        self._running: list[_Sequence] = []  # in the order of the rows
        self._rows: Rows | None = None
        self._free_slots = list(range(self._slots))[::-1]
        self._free_groups: list[int] = []
        self._tables = Tables(self._zeros(self._slots, 0), self._zeros(0, 0), self._zeros(0))
        self._ids_SM = self._zeros(self._slots, 0)
        self._logps_SM = torch.zeros(self._slots, 0, dtype=self._precise, device=self._device)
        self._note_running()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.long, device=self._device)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def submit(self, request: Request) -> None:
        """Raises ModelError when the prompt leaves no room in the model's context."""
        params = request.params
        limit = min(params.max_tokens, room_after(request.prompt, self._decoder.architecture.context))
        cut = Cut(params.top_k, params.top_p, params.min_p)
        self._waiting.append(_Sequence(request, self._prompt_of(request), limit, cut))

    def _prompt_of(self, request: Request) -> Prompt:
        """The one prompt of all requests that begin so, for one user more."""
        prompt = self._prompts.setdefault(tuple(request.prompt), Prompt(request.prompt))
        prompt.users += 1
        return prompt

    def cancel(self, keys: set[Hashable]) -> None:
        """Forgets these requests, waiting or running."""
        for sequence in [s for s in self._waiting if s.request.key in keys]:
            self._waiting.remove(sequence)
            self._leave(sequence)
        if self._rows is not None and any(s.request.key in keys for s in self._running):
            self._keep(torch.tensor([s.request.key not in keys for s in self._running], device=self._device))
        if self.idle:
            self._clear()

    @torch.inference_mode()
    def step(self) -> Step:
        """One more token for all that runs, after those that wait have been let in.

        When it raises, what ran or was being let in is forgotten; what waits still waits. Raises ModelError for what
        the model or a request's sampling parameters have to answer for.
        """
        try:
            return self._step()
        except BaseException:
            self._clear()  # nothing half done may be built upon: a prompt that has pages and was not read, for one
            raise

    def _step(self) -> Step:
        joining = self._admit()
        hidden = []
        if self._rows is not None:
            hidden.append(self._decoder.step(self._rows, self._tables))
        if joining:
            hidden.append(torch.stack([sequence.prompt.hidden_H for sequence in joining]))  # type: ignore[misc]
            new = self._new_rows(joining)
            self._rows = new if self._rows is None else self._rows.joined(new)
            self._running += joining
            self._note_running()
        rows = self._rows
        assert rows is not None, "a step needs a request"
        ids_N, logps_N = self._sample(self._decoder.logits(hidden[0] if len(hidden) == 1 else torch.cat(hidden)), rows)
        self._ids_SM[rows.slot_N, rows.length_N] = ids_N
        self._logps_SM[rows.slot_N, rows.length_N] = logps_N
        rows.length_N, rows.last_N = rows.length_N + 1, ids_N
        stopping_N = self._is_stop_V[ids_N]
        if self._stop_strings:
            stopping_N = stopping_N | self._at_stop_string()
        ended_N = stopping_N | (rows.length_N == rows.limit_N)

        step = Step(self._requests, ids_N, logps_N, [])
        if bool(ended_N.any()):
            for n in ended_N.nonzero().squeeze(1).tolist():
                step.finished.append((step.requests[n], self._completion(n, bool(stopping_N[n]))))
            self._keep(~ended_N)
        elif joining:
            self._keep(torch.ones_like(ended_N))
        if self.idle:
            self._clear()
        return step

    def _admit(self) -> list[_Sequence]:
        """Takes waiting sequences in, reads their prompts, and gives them slots and pages."""
        joining: list[_Sequence] = []
        unread: list[Prompt] = []
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            prompt = sequence.prompt
            new = not prompt.pages
            if new and unread and sum(len(p.ids) for p in [*unread, prompt]) > PROMPT_TOKENS:
                break
            own, shared = pages_for(sequence.limit), pages_for(len(prompt.ids)) if new else 0
            if not self._find_pages(own + shared, alone=not joining and not self._running):
                break
            self._waiting.popleft()
            joining.append(sequence)
            if new:
                unread.append(prompt)
                prompt.pages = self._decoder.cache.take(shared)
                self._enter_group(prompt)
            sequence.slot, sequence.pages = self._free_slots.pop(), self._decoder.cache.take(own)
            self._enter_slot(sequence)
        if unread:
            self._decoder.read(unread)
        return joining

    def _find_pages(self, count: int, alone: bool) -> bool:
        """Whether the cache has so many free pages, after growing it where that is possible."""
        cache = self._decoder.cache
        if cache.free >= count:
            return True
        budget = free_bytes(self._device) // 2 if self._cache_bytes is None else self._cache_bytes
        if self._cache_bytes is None:
            budget += cache.pages * cache.page_bytes  # which are not free memory any more
        cache.grow(min(max(cache.pages + self._demand(), 2 * cache.pages), budget // cache.page_bytes))
        if cache.free < count and alone:
            cache.grow(cache.pages + count - cache.free)
        return cache.free >= count

    def _demand(self) -> int:
        """Pages of those that wait, as many as there are slots for."""
        waiting = [self._waiting[i] for i in range(min(len(self._waiting), len(self._free_slots)))]
        prompts = {id(sequence.prompt): sequence.prompt for sequence in waiting if not sequence.prompt.pages}
        ids = sum(pages_for(len(prompt.ids)) for prompt in prompts.values())
        return ids + sum(pages_for(sequence.limit) for sequence in waiting)

    def _enter_group(self, prompt: Prompt) -> None:
        tables = self._tables
        if not self._free_groups:
            count = len(tables.prompt_length_G)
            self._free_groups = list(range(count, 2 * count + 8))[::-1]
        prompt.group = self._free_groups.pop()
        tables.prompt_pages_GM = _wide_enough(tables.prompt_pages_GM, prompt.group + 1, len(prompt.pages))
        tables.prompt_length_G = _wide_enough(tables.prompt_length_G[:, None], prompt.group + 1, 1)[:, 0].contiguous()
        tables.prompt_pages_GM[prompt.group, : len(prompt.pages)] = torch.tensor(prompt.pages, device=self._device)
        tables.prompt_length_G[prompt.group] = len(prompt.ids)

    def _enter_slot(self, sequence: _Sequence) -> None:
        tables, pages = self._tables, sequence.pages
        tables.own_pages_SM = _wide_enough(tables.own_pages_SM, self._slots, len(pages))
        tables.own_pages_SM[sequence.slot, : len(pages)] = torch.tensor(pages, device=self._device)
        # Not touched before it is written to: a limit may be far beyond what is said.
        self._ids_SM = _wide_enough(self._ids_SM, self._slots, sequence.limit, Tensor.new_empty)
        self._logps_SM = _wide_enough(self._logps_SM, self._slots, sequence.limit, Tensor.new_empty)
        self._decoder.rotary.reserve(len(sequence.prompt.ids) + sequence.limit)

    def _new_rows(self, joining: Sequence[_Sequence]) -> Rows:
        def whole(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, device=self._device)

        return Rows(
            slot_N=whole([s.slot for s in joining]),
            group_N=whole([s.prompt.group for s in joining]),
            length_N=self._zeros(len(joining)),
            limit_N=whole([s.limit for s in joining]),
            last_N=self._zeros(len(joining)),
            seed_N=whole([s.request.seed for s in joining]),
            temperature_N=torch.tensor(
                [s.request.params.temperature for s in joining], dtype=self._precise, device=self._device
            ),
        )

    def _note_running(self) -> None:
        """What `step` has to know of the running sequences. Rows that are cut alike go together, None is all rows."""
        self._requests = [sequence.request for sequence in self._running]
        self._stop_strings = any(request.params.stop for request in self._requests)
        cuts: dict[Cut, list[int]] = {}
        for n, sequence in enumerate(self._running):
            cuts.setdefault(sequence.cut, []).append(n)
        self._cuts: list[tuple[Cut, Tensor | None]] = [
            (cut, torch.tensor(rows, device=self._device) if len(cuts) > 1 else None) for cut, rows in cuts.items()
        ]

    def _sample(self, logits_NV: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        if len(self._cuts) == 1 and not self._cuts[0][0].acts:
            return self._decoder.kernels.sample(logits_NV, rows)
        ids_N, logps_N = self._zeros(len(rows)), torch.zeros(len(rows), dtype=self._precise, device=self._device)
        for cut, index in self._cuts:
            part = rows if index is None else rows.select(index)
            at = slice(None) if index is None else index
            logps_BV = log_probs(logits_NV[at], part.temperature_N[:, None], self._decoder.vocab)
            drawn = draw(logps_BV, uniforms(part.seed_N, part.length_N), cut)
            ids_N[at], logps_N[at] = drawn.ids_B, drawn.logps_B
            places = range(len(rows)) if index is None else index.tolist()
            for n, ids in zip(places, drawn.support or (), strict=False):
                self._running[n].support.add(ids)
        return ids_N, logps_N

    def _at_stop_string(self) -> Tensor:
        assert self._rows is not None and self._decode is not None, "stop strings need a tokenizer"
        found = []
        for sequence, length in zip(self._running, self._rows.length_N.tolist(), strict=True):
            stop = sequence.request.params.stop
            ids = self._ids_SM[sequence.slot, :length].tolist() if stop else []
            found.append(bool(stop) and ends_in_stop(ids, sequence.request.prompt[-1], self._decode, stop))
        return torch.tensor(found, device=self._device)

    def _completion(self, n: int, stopped: bool) -> Completion:
        sequence = self._running[n]
        assert self._rows is not None
        length = int(self._rows.length_N[n])
        logps = self._logps_SM[sequence.slot, :length].tolist()
        check_logps(logps)
        completion = Completion(
            self._ids_SM[sequence.slot, :length].tolist(),
            logps,
            "stop" if stopped else "length",
            support=sequence.support.whole() if sequence.cut.acts else None,
        )
        if self._decode is None:
            return completion
        request = sequence.request
        return with_text(completion, request.prompt, self._decode, sorted(self._stop_ids), request.params.stop)

    def _keep(self, keep_N: Tensor) -> None:
        """Takes the others out of the batch and puts the rows of one prompt side by side."""
        assert self._rows is not None
        index = keep_N.nonzero().squeeze(1)
        index = index[self._rows.group_N[index].argsort(stable=True)]
        for sequence, kept in zip(self._running, keep_N.tolist(), strict=True):
            if not kept:
                self._leave(sequence)
        self._running = [self._running[n] for n in index.tolist()]
        self._rows = self._rows.select(index) if self._running else None
        self._note_running()

    def _leave(self, sequence: _Sequence) -> None:
        """Gives back what a sequence had, and its prompt's pages when it was the last one."""
        cache, prompt = self._decoder.cache, sequence.prompt
        if sequence.slot >= 0:
            self._free_slots.append(sequence.slot)
            cache.give_back(sequence.pages)
        prompt.users -= 1
        if not prompt.users:
            del self._prompts[tuple(prompt.ids)]
            if prompt.group >= 0:
                cache.give_back(prompt.pages)
                self._free_groups.append(prompt.group)


def _wide_enough(table: Tensor, lines: int, columns: int, new: Callable[..., Tensor] = Tensor.new_zeros) -> Tensor:
    """The table with so many lines and columns at least; twice as many as before where it has to grow."""
    if table.shape[0] >= lines and table.shape[1] >= columns:
        return table
    shape = [(table.shape[0], lines), (table.shape[1], columns)]
    wider = new(table, [have if have >= need else max(need, 2 * have) for have, need in shape])
    wider[: table.shape[0], : table.shape[1]] = table
    return wider
