"""One data-parallel rank: its view of the shared weights and what it computes with them. The same in every process.

It needs no transformers model and knows nothing of the other ranks; `ranks` divides the work and adds up the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from rewardsmith.rollout.engine import Completion
from rewardsmith.rollout.fast import FastEngine
from rewardsmith.rollout.weights import Weights
from rewardsmith.train import fast
from rewardsmith.train.batch import Example
from rewardsmith.train.losses import LossSettings
from rewardsmith.train.memory import Budget
from rewardsmith.train.update import Gradient

if TYPE_CHECKING:
    from rewardsmith.config import SamplingParamsConfig


@dataclass(frozen=True)
class Sampling:
    """What the engine needs to know of the tokenizer; the tokenizer itself only where stop strings are asked for."""

    stop_ids: Sequence[int]
    vocab: int
    tokenizer: Any = None


@dataclass
class Rank:
    """`gradients` has the names and shapes of the bound adapter; its tensors are views of this rank's own row."""

    number: int
    count: int
    weights: Weights
    gradients: Mapping[str, Tensor]
    engine: FastEngine
    budget: Budget
    vocab: int

    @classmethod
    def make(
        cls,
        number: int,
        count: int,
        weights: Weights,
        gradients_F: Tensor,
        sampling: Sampling,
        between_tokens: Callable[[], None],
    ) -> Self:
        """`gradients_F` is this rank's row, with room for all numbers of the adapter."""
        engine = FastEngine(
            weights,
            stop_ids=sampling.stop_ids,
            vocab=sampling.vocab,
            tokenizer=sampling.tokenizer,
            between_tokens=between_tokens,
        )
        gradients = _views(gradients_F, weights.adapter())
        return cls(number, count, weights, gradients, engine, Budget(weights.architecture, count), sampling.vocab)

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
        """This rank's part of the merged copy."""
        self.weights.merge(self.number, self.count)

    def gradient(
        self,
        examples: Sequence[Example],
        settings: LossSettings,
        temperature: float,
        old_logps: list[Tensor | None] | None,
    ) -> Gradient:
        """Of a share of the batch, into this rank's row."""
        for tensor in self.gradients.values():
            tensor.zero_()
        return fast.gradient(
            self.weights,
            examples,
            settings,
            temperature=temperature,
            vocab=self.vocab,
            gradients=self.gradients,
            budget=self.budget,
            old_logps=old_logps,
        )


def _views(row_F: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ends = [0, *accumulate(tensor.numel() for tensor in like.values())]
    pieces = [row_F[start:stop] for start, stop in pairwise(ends)]
    return {name: piece.view(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


def row_size(weights: Weights) -> int:
    """Numbers of the bound adapter."""
    return sum(tensor.numel() for tensor in weights.adapter().values())


def new_rows(weights: Weights, count: int) -> Tensor:
    """`count` rows of zeros for the gradients of as many ranks."""
    first = next(iter(weights.adapter().values()))
    return torch.zeros(count, row_size(weights), dtype=first.dtype, device=first.device)
