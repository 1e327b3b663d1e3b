"""Decode steps as CUDA graphs: on a GPU, starting a step's many small kernels one by one costs more than running them.

One graph per number of rows, rounded up; longer sequences need no other one, as the attention kernel reads lengths from
the device. Never run on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from rewardsmith.rollout.fast.attention import Rows


def rounded_up(rows: int) -> int:
    """1, 2, 4, 8, then multiples of 8: few graphs, little wasted."""
    return next((size for size in (1, 2, 4, 8) if size >= rows), -(-rows // 8) * 8)


def padded(rows: Rows, count: int) -> Rows:
    """The last row once more as often as needed: it then writes the same numbers to the same places."""
    return rows.select(torch.arange(count, device=rows.slot_N.device).clamp(max=len(rows) - 1))


class Graphs:
    def __init__(self) -> None:
        self._places: Hashable = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Rows, Tensor]] = {}

    def run(self, step: Callable[[Rows], Tensor], rows: Rows, memory: Sequence[Tensor]) -> Tensor:
        """What `step` makes of the rows, N x H. It must not wait for the device.

        `memory` is what it reads and writes and what may be somewhere else the next time: then it is captured anew.
        """
        places = tuple((tensor.data_ptr(), tensor.shape) for tensor in memory)
        if places != self._places:
            self._graphs.clear()
            self._places = places
        count = rounded_up(len(rows))
        now = padded(rows, count)
        if count not in self._graphs:
            self._graphs[count] = _captured(step, now)
        graph, static, hidden_NH = self._graphs[count]
        for field in fields(Rows):
            getattr(static, field.name).copy_(getattr(now, field.name))
        graph.replay()
        return hidden_NH[: len(rows)]


def _captured(step: Callable[[Rows], Tensor], rows: Rows) -> tuple[torch.cuda.CUDAGraph, Rows, Tensor]:
    # Once before: libraries set themselves up at first use, which a graph must not contain. A step that is done twice
    # writes the same keys and values.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(rows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden_NH = step(rows)
    return graph, rows, hidden_NH
