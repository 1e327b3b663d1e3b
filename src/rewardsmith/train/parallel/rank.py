"""One data-parallel rank: its view of the shared weights and what it computes with them. The same in every process.

It needs no transformers model and knows nothing of the other ranks; `ranks` divides the work and adds up the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewardsmith.rollout.engine import Completion
from rewardsmith.rollout.fast import blocked
from rewardsmith.rollout.fast.engine import FastEngine
from rewardsmith.rollout.memory import free_bytes
from rewardsmith.rollout.model.weights import Weights
from rewardsmith.train.batch import Example, Gradient
from rewardsmith.train.fast import gradient as fast
from rewardsmith.train.fast.memory import Budget
from rewardsmith.train.losses import LossSettings

if TYPE_CHECKING:
    from rewardsmith.config import SamplingParamsConfig


@dataclass(frozen=True)
class Sampling:
    """What the engine needs to know of the tokenizer; the tokenizer itself only where stop strings are asked for."""

    stop_ids: Sequence[int]
    vocab: int
    tokenizer: Any = None


class Rank:
    """Rank `number` of `count`. `row_F` is where its gradient goes, all numbers of the adapter in one row.

    With a `device`, the weights are copied there; else they are used where they are, which may be shared memory. What
    it gives away lies in the CPU's memory: no rank can read another one's card.
    """

    def __init__(
        self,
        number: int,
        count: int,
        weights: Weights,
        device: str | None,
        row_F: Tensor,
        sampling: Sampling,
        *,
        between_tokens: Callable[[], None],
    ) -> None:
        self.number, self.count = number, count
        home = weights.embed_VH.device if device is None else torch.device(device)
        if home.type == "cuda":
            # Kernels and graphs go to the current card, whatever card their tensors are on.
            torch.cuda.set_device(home)
        self.weights = weights if device is None else weights.on(device)
        sharing, free = sharing_memory(count, home.type), free_bytes(home)
        self.engine = FastEngine(
            self.weights,
            stop_ids=sampling.stop_ids,
            vocab=sampling.vocab,
            tokenizer=sampling.tokenizer,
            between_tokens=between_tokens,
            cache_bytes=free // (2 * sharing),
            blocked_bytes=blocked.most_bytes(free, sharing),
        )
        self.budget = Budget(sharing)
        self._vocab = sampling.vocab
        self._row_F = row_F
        # The row is rank 0's to read, in shared memory; on a GPU the gradient is computed there first.
        self._own_F = row_F.to(self.weights.embed_VH.device)

    def generate(
        self,
        prompts: Sequence[list[int]],
        counts: Sequence[int],
        params: SamplingParamsConfig,
        seeds: Sequence[int],
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As `Engine.generate`, with a number of completions of its own for each prompt."""
        return self.engine.generate(prompts, counts, params, seeds)

    def merge(self) -> None:
        """This rank's part of a merged copy that all ranks read."""
        self.engine.merge(self.number, self.count)

    def deliver(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """The policy's adapter, to a rank with weights of its own. Raises DeliveryError."""
        self.engine.load_adapter(tensors, version)
        self.weights.verify(version)

    def gradient(
        self,
        examples: Sequence[Example],
        settings: LossSettings,
        temperature: float,
        old_logps: list[Tensor | None] | None,
    ) -> Gradient:
        """Of a share of the batch, into this rank's row."""
        self._own_F.zero_()
        gradient = fast.gradient(
            self.weights,
            examples,
            settings,
            temperature=temperature,
            vocab=self._vocab,
            gradients=self.views(self._own_F),
            budget=self.budget,
            old_logps=old_logps,
        )
        if self._own_F is not self._row_F:
            self._row_F.copy_(self._own_F)
        return replace(gradient, logps=[None if logps is None else logps.cpu() for logps in gradient.logps])

    def reference_logps(self, examples: Sequence[Example], temperature: float) -> list[Tensor]:
        """Of each completion's tokens under the model with its adapter off."""
        found = fast.logps(self.weights, examples, temperature, self._vocab, budget=self.budget, base=True)
        return [logps.cpu() for logps in found]

    def views(self, row_F: Tensor) -> dict[str, Tensor]:
        """A row as tensors with the names and shapes of the adapter."""
        like = self.weights.adapter()
        ends = [0, *accumulate(tensor.numel() for tensor in like.values())]
        pieces = [row_F[start:stop] for start, stop in pairwise(ends)]
        return {name: piece.view(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


def sharing_memory(ranks: int, device: str) -> int:
    """How many of the ranks share the memory that one sees as free: on CPUs all; each GPU is one rank's own."""
    return ranks if device == "cpu" else 1


def new_rows(weights: Weights, count: int) -> Tensor:
    """`count` rows of zeros for the gradients of as many ranks."""
    adapter = weights.adapter()
    first = next(iter(adapter.values()))
    size = sum(tensor.numel() for tensor in adapter.values())
    return torch.zeros(count, size, dtype=first.dtype, device=first.device)
