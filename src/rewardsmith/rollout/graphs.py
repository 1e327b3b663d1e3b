"""Decode steps as CUDA graphs: on a GPU, starting a step's many small kernels one by one costs more than running them.

One graph per number of rows, rounded up; longer sequences need no other one, as the attention kernel reads lengths from
the device. Never run on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields

import torch
from torch import Tensor

from rewardsmith.rollout.attention import Rows


def rounded_up(rows: int) -> int:
    """1, 2, 4, 8, then multiples of 8: few graphs, little wasted."""
    return next((size for size in (1, 2, 4, 8) if size >= rows), -(-rows // 8) * 8)


def padded(rows: Rows, count: int) -> Rows:
    """The last row once more as often as needed: it then writes the same numbers to the same places."""
    return rows.select(torch.arange(count, device=rows.slot_N.device).clamp(max=len(rows) - 1))


class Graphs:
    """`step` computes N x H from rows, reading and writing memory that stays where it is; never waits for the device."""

    def __init__(self, step: Callable[[Rows], Tensor]) -> None:
        self._step = step
        self._memory: Hashable = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Rows, Tensor]] = {}

    def run(self, rows: Rows, memory: Hashable) -> Tensor:
        """`memory` names all memory that a step uses, by addresses; graphs of another one are forgotten."""
        if memory != self._memory:
            self._graphs.clear()
            self._memory = memory
        count = rounded_up(len(rows))
        now = padded(rows, count)
        if count not in self._graphs:
            self._graphs[count] = self._capture(now)
        graph, static, hidden_NH = self._graphs[count]
        for field in fields(Rows):
            getattr(static, field.name).copy_(getattr(now, field.name))
        graph.replay()
        return hidden_NH[: len(rows)]

    def _capture(self, rows: Rows) -> tuple[torch.cuda.CUDAGraph, Rows, Tensor]:
        # Once before: libraries set themselves up at first use, which a graph must not contain. A step that is done
        # twice writes the same keys and values.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden_NH = self._step(rows)
        return graph, rows, hidden_NH
