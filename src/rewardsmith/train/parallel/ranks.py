"""Data parallel on one machine: this process is rank 0, worker processes are the others.

On CPUs a rank has one thread, and all ranks read the same weights in shared memory, of which each makes a part of the
merged copy. On GPUs each rank has a card and its own copy of the weights (not run on several GPUs). A rank samples a
share of the completions and computes the gradient of a share of the batch into a row of its own; rank 0 adds the rows
up. The global batch defines the loss, so the number of ranks changes nothing but rounding. What one rank does is in
`rank`, who gets which completions in `shares`.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor

from rewardsmith import machine
from rewardsmith.rollout.adapter import Fingerprint
from rewardsmith.rollout.engine import Completion
from rewardsmith.rollout.model.weights import Weights
from rewardsmith.train.batch import Example, Gradient
from rewardsmith.train.fast import gradient as fast
from rewardsmith.train.losses import LossSettings
from rewardsmith.train.parallel.rank import Rank, Sampling, new_rows
from rewardsmith.train.parallel.shares import Slice, shares
from rewardsmith.train.parallel.worker import Worker

if TYPE_CHECKING:
    from rewardsmith.config import SamplingParamsConfig

MAX_RANKS = 8
# Base weights up to which one more rank is taken to be faster than one more thread: it is with 126 MB, the limit itself
# is a guess (docs/benchmarks.md).
SMALL_MODEL_BYTES = 512 * 2**20

Result = TypeVar("Result")


class Ranks:
    """Start it early, before the process has a model and threads; `load` then gives it the weights to work with.

    `workers` processes share memory with this one; with `devices`, each rank has weights of its own on one of them,
    rank 0 on the first. Samples as an `Engine` does, with all ranks. Use it as a context manager, or `close` it.
    """

    def __init__(self, workers: int = 0, devices: Sequence[str] = ()) -> None:
        self._devices = devices
        # A forked worker shares what this process has loaded so far, torch above all. With GPUs, and elsewhere, forking
        # is not safe.
        forks = sys.platform == "linux" and not devices
        context = multiprocessing.get_context("fork" if forks else "spawn")
        self._workers: list[Worker] = []
        for number in range(1, max(workers, len(devices) - 1) + 1):
            self._workers.append(Worker(context, number, self._workers))

    @classmethod
    def of_this_machine(cls) -> Self:
        """One rank for each GPU, else one for each core, at most 8; those that a model has no use for end in `load`."""
        if torch.cuda.is_available():
            return cls(devices=[f"cuda:{i}" for i in range(torch.cuda.device_count())])
        return cls(min(machine.available_cores(), MAX_RANKS) - 1)

    @property
    def count(self) -> int:
        return 1 + len(self._workers)

    @property
    def kernel(self) -> str:
        """What the engine computes with, see `FastEngine`."""
        return self._own.engine.kernel

    def load(
        self,
        weights: Weights,
        sampling: Sampling,
        between_tokens: Callable[[], None] = lambda: None,
        notice: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Takes over `weights` with its bound adapter. `notice` hears what a user should know of.

        Workers that a model of this size has no use for end here, and this process takes their threads.
        """
        self._between_tokens = between_tokens
        if not self._devices:
            self._end_useless_workers(weights, notice)
            torch.set_num_threads(1 if self._workers else machine.threads())
        self._rows_RF = new_rows(weights, self.count)
        if self._workers:
            self._rows_RF = self._rows_RF.cpu().share_memory_()  # type: ignore[no-untyped-call]
            sent = weights.on("cpu") if self._devices else weights
            sent.share()
        for worker in self._workers:
            worker.notice = notice
            device = self._devices[worker.number] if self._devices else None
            worker.order("load", worker.number, self.count, sent, device, self._rows_RF[worker.number], sampling)
        self._own = Rank(0, self.count, weights, None, self._rows_RF[0], sampling, between_tokens=self._between)
        self._own.budget.notice = notice
        self._answers()

    def _end_useless_workers(self, weights: Weights, notice: Callable[[str], None]) -> None:
        size = sum(projection.base_OI.nbytes for projection in weights.projections) + weights.embed_VH.nbytes
        if size > SMALL_MODEL_BYTES or weights.embed_VH.device.type != "cpu":
            self.close()
        elif self._workers and not _fits_shared_memory(3 * size):
            notice("one process trains: /dev/shm is too small for more; in a container, raise --shm-size")
            self.close()

    # ---- Engine -----------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[list[int]], num_generations: int, params: SamplingParamsConfig, seeds: Sequence[int]
    ) -> Generator[tuple[int, list[Completion]], None, None]:
        """As `Engine.generate`: every group as soon as it is whole. A group may be drawn by two ranks."""
        costs = [[params.max_tokens + len(prompt) / num_generations] * num_generations for prompt in prompts]
        divided = shares(costs, self.count)
        drawn: list[list[Completion | None]] = [[None] * num_generations for _ in prompts]

        def work(share: list[Slice]) -> tuple[Any, ...]:
            own_seeds = [seeds[s.group * num_generations + n] for s in share for n in range(s.start, s.stop)]
            return [prompts[s.group] for s in share], [s.stop - s.start for s in share], params, own_seeds

        def whole(piece: Slice, completions: list[Completion]) -> Iterator[tuple[int, list[Completion]]]:
            group = drawn[piece.group]
            group[piece.start : piece.stop] = completions
            if None not in group:
                yield piece.group, [completion for completion in group if completion is not None]

        def received() -> Iterator[tuple[int, list[Completion]]]:
            for worker in self._workers:
                while worker.groups:
                    place, completions = worker.groups.popleft()
                    yield from whole(divided[worker.number][place], completions)

        try:
            for worker in self._workers:
                worker.order("generate", *work(divided[worker.number]))
            for place, completions in self._own.generate(*work(divided[0])):
                yield from whole(divided[0][place], completions)
                yield from received()
            while busy := [worker.connection for worker in self._workers if worker.busy]:
                wait(busy, timeout=0.1)
                self._between()
                yield from received()
            yield from received()
        finally:
            for worker in self._workers:
                worker.cancel()

    def load_adapter(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Copies the policy's adapter and makes the merged weights anew, where memory is shared each rank a part.

        Raises DeliveryError when it does not fit, and when what will be multiplied with is not base plus adapter.
        """
        if self._devices:
            on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
            for worker in self._workers:
                worker.order("deliver", on_cpu, version)
            self._own.deliver(tensors, version)
            self._answers()
            return
        self._own.engine.take_adapter(tensors, version)
        for worker in self._workers:
            worker.order("merge")
        self._own.merge()
        self._answers()
        self._own.weights.verify(version)

    def fingerprint(self) -> Fingerprint:
        return self._own.engine.fingerprint()

    # ---- Gradient ---------------------------------------------------------------------------------------------------

    def gradient(
        self,
        examples: Sequence[Example],
        settings: LossSettings,
        temperature: float,
        old_logps: list[Tensor | None] | None = None,
    ) -> tuple[Gradient, Mapping[str, Tensor]]:
        """Of the whole batch; the tensors have the adapter's names and are overwritten by the next call."""
        places = _divided(examples, lambda example: fast.cost(example, settings), self.count)

        def work(mine: list[int]) -> tuple[Any, ...]:
            old = None if old_logps is None else [old_logps[i] for i in mine]
            return [examples[i] for i in mine], settings, temperature, old

        for worker in self._workers:
            worker.order("gradient", *work(places[worker.number]))
        parts = [self._own.gradient(*work(places[0])), *self._answers()]
        for row_F in self._rows_RF[1:]:
            self._rows_RF[0] += row_F
        whole = replace(Gradient.total(parts), logps=_in_order([part.logps for part in parts], places))
        return whole, self._own.views(self._rows_RF[0])

    def reference_logps(self, examples: Sequence[Example], temperature: float) -> list[Tensor]:
        """Of each completion's tokens under the model with its adapter off."""
        places = _divided(examples, lambda example: float(len(example.completion)), self.count)

        def work(mine: list[int]) -> tuple[Any, ...]:
            return [examples[i] for i in mine], temperature

        for worker in self._workers:
            worker.order("reference_logps", *work(places[worker.number]))
        return _in_order([self._own.reference_logps(*work(places[0])), *self._answers()], places)

    # ---- Workers ----------------------------------------------------------------------------------------------------

    def _between(self) -> None:
        """Between two tokens of this rank: is the job still wanted? What the others have drawn is taken in."""
        self._between_tokens()
        for worker in self._workers:
            worker.receive()

    def _answers(self) -> list[Any]:
        return [worker.answer() for worker in self._workers]

    def close(self) -> None:
        """Ends the workers."""
        while self._workers:
            self._workers.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _fits_shared_memory(size: int) -> bool:
    return not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free > size


def _divided(examples: Sequence[Example], cost: Callable[[Example], float], ranks: int) -> list[list[int]]:
    """For each rank the places of its examples: equal shares of the cost, examples of one prompt together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(tuple(example.prompt), []).append(i)
    by_prompt = list(groups.values())
    divided = shares([_costs([examples[i] for i in group], cost) for group in by_prompt], ranks)
    return [[i for s in share for i in by_prompt[s.group][s.start : s.stop]] for share in divided]


def _costs(group: Sequence[Example], cost: Callable[[Example], float]) -> list[float]:
    """Of each completion of a prompt, with its part of the prompt's own."""
    own = [cost(example) for example in group]
    computed = sum(rows > 0 for rows in own)
    return [rows and rows + len(group[0].prompt) / computed for rows in own]


def _in_order(parts: Sequence[Sequence[Result]], places: Sequence[Sequence[int]]) -> list[Result]:
    """What the ranks found of the examples at their places, in the order of the whole batch."""
    found: dict[int, Result] = {}
    for part, mine in zip(parts, places, strict=True):
        found |= dict(zip(mine, part, strict=True))
    return [found[place] for place in range(len(found))]
