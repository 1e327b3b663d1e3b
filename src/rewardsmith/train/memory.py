"""How many tokens go through the model at a time: what fits into free memory, and no more than speed asks for.

Where memory is ample the number is a constant, so a resumed job divides its batches as before. When memory runs out all
the same, the number is halved for the rest of the job, then layers are computed twice in place of being kept, and the
user hears of it. How a batch is divided is `packed`'s business.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rewardsmith.errors import ModelError
from rewardsmith.rollout.architecture import Architecture
from rewardsmith.rollout.memory import free_bytes
from rewardsmith.rollout.weights import Weights

ROWS = {"cpu": 2048, "cuda": 16384}  # more is not faster: measured, docs/benchmarks.md
FEWEST_ROWS = 64  # to begin with; halving may go below
SHARE = 0.5  # of the free memory for one step's work: the estimate is not exact, and others want some


def bytes_per_row(weights: Weights, recompute: bool = False) -> int:
    """What one token takes from its forward to its backward pass, logits and scores apart."""
    shape, layer = weights.architecture, weights.layers[0]
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # The residual stream twice; q, k, v, and the attention's result; gate and up.
    kept = 2 * shape.hidden + 2 * (q + kv) + 2 * shape.intermediate
    # What the norms take in that some families have more.
    kept += q + 2 * kv if layer.q_norm is not None else 0
    kept += 2 * shape.hidden if layer.post_mlp_norm is not None else 0
    # Gradients on their way through one layer: those of gate and up, with what they are made of, are the most.
    passing = 6 * shape.intermediate + 6 * shape.hidden
    layers = len(weights.layers)
    numbers = (layers * shape.hidden + kept if recompute else layers * kept) + passing
    return weights.embed_VH.element_size() * numbers


class Budget:
    """The number of rows of a micro-batch, for one of `ranks` processes that share the memory.

    `notice` hears what a user should know of.
    """

    def __init__(self, architecture: Architecture, ranks: int = 1) -> None:
        self._ranks = ranks
        self._rows: int | None = None
        self.recompute = False
        self.notice: Callable[[str], None] = lambda message: None

    def rows(self, weights: Weights) -> int:
        if self._rows is None:
            like = weights.embed_VH
            room = free_bytes(like.device) * SHARE / self._ranks
            affordable = int(room / bytes_per_row(weights))
            wanted = ROWS["cpu" if like.device.type == "cpu" else "cuda"]
            # In steps of two, so that a little more or less free memory does not change how a batch is divided.
            while wanted > max(affordable, FEWEST_ROWS):
                wanted //= 2
            self._rows = wanted
        return self._rows

    def shrink(self, longest: int) -> None:
        """After running out of memory. `longest` is the number of rows of the longest completion with its prompt.

        Raises ModelError when not even one completion fits with everything else given up.
        """
        assert self._rows is not None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self._rows > longest:
            self._rows //= 2
            self.notice(f"memory ran out: from now on at most {self._rows} tokens are trained on at a time")
        elif not self.recompute:
            self.recompute = True
            self.notice("memory ran out: from now on each layer is computed twice in a step, which takes less of it")
        else:
            raise ModelError(
                f"not enough memory to train on one completion of {longest} tokens, its prompt included. A shorter "
                "sampling_params.max_tokens, a lower rank or a smaller base model needs less"
            )


def out_of_memory(error: BaseException) -> bool:
    """Whether it says so; torch's allocator of CPU memory raises a plain RuntimeError."""
    told = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in told or "not enough memory" in told)
    )
