"""How many tokens go through the model at a time: what fits into free memory, and no more than speed asks for.

Where memory is ample the number follows from the model and the batch alone, so a resumed job divides its batches as
before. When memory runs out all the same, it is halved for the rest of the job, then layers are computed twice in place
of being kept, and the user hears of it. The arithmetic is in functions of numbers alone, which the estimate before the
start shares. How a batch is divided is `packed`'s business.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rewardsmith.errors import ModelError
from rewardsmith.rollout.memory import free_bytes
from rewardsmith.rollout.model.weights import Weights

ROWS = {"cpu": 2048, "cuda": 16384}  # more is not faster
KEPT_BYTES = 2**28  # on a CPU, where from ENOUGH_ROWS on a model large enough to keep that much is as fast as can be
ENOUGH_ROWS = 512
PROMPTS = 8  # a micro-batch is worth that many prompts at least, for a prompt is computed again in each
FEWEST_ROWS = 64  # however little memory is free to begin with; halving may go below
SHARE = 0.5  # of the free memory for one step's work: the estimate is not exact, and others want some


def row_numbers(
    *, layers: int, hidden: int, intermediate: int, q: int, kv: int, qk_norms: bool, post_norms: bool, recompute: bool
) -> int:
    """What one token takes from its forward to its backward pass, logits and scores apart, in numbers.

    `q` and `kv` are the widths of all queries and of all keys; `qk_norms` and `post_norms` are norms that some families
    have more.
    """
    # The residual stream twice; q, k, v, and the attention's result; gate and up; what the norms take in.
    kept = 2 * hidden + 2 * (q + kv) + 2 * intermediate + (q + 2 * kv) * qk_norms + 2 * hidden * post_norms
    # Gradients on their way through one layer: those of gate and up, with what they are made of, are the most.
    passing = 6 * intermediate + 6 * hidden
    return (layers * hidden + kept if recompute else layers * kept) + passing


def bytes_per_row(weights: Weights, recompute: bool = False) -> int:
    """`row_numbers` of these weights, in bytes."""
    shape, layer = weights.architecture, weights.layers[0]
    numbers = row_numbers(
        layers=len(weights.layers),
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        q=shape.heads * shape.head_dim,
        kv=shape.kv_heads * shape.head_dim,
        qk_norms=layer.q_norm is not None,
        post_norms=layer.post_mlp_norm is not None,
        recompute=recompute,
    )
    return weights.embed_VH.element_size() * numbers


def micro_batch(
    kept: int, recomputed: int, prompt: int, longest: int, room: float, device: str, recompute: bool = False
) -> tuple[int, bool]:
    """Rows at a time for a batch, and whether layers are computed twice: with `recompute`, or where `room` wants it.

    `kept` and `recomputed` are the bytes of a row without that and with it, `room` the bytes that all rows may take.
    `prompt` are the rows of the longest prompt, `longest` those of the longest completion with its prompt. A completion
    that has more rows than these is computed alone.
    """
    recompute = recompute or longest * kept > room
    per_row = recomputed if recompute else kept
    rows = ROWS[device]
    while device == "cpu" and rows > ENOUGH_ROWS and rows * per_row > KEPT_BYTES:
        rows //= 2
    rows = max(rows, PROMPTS * prompt)
    # In steps of two, so that a little more or less free memory does not change how a batch is divided.
    while rows > max(room / per_row, FEWEST_ROWS):
        rows //= 2
    return rows, recompute


class Budget:
    """The number of rows of a micro-batch, for one of `sharing` processes that share the memory.

    `most` is a limit found by running out of memory, `recompute` says that layers are computed twice. `notice` hears
    what a user should know of.
    """

    def __init__(self, sharing: int = 1) -> None:
        self._sharing = sharing
        self._room: float | None = None
        self._latest = 0
        self.most: int | None = None
        self.recompute = False
        self.notice: Callable[[str], None] = lambda message: None

    def rows(self, weights: Weights, prompt: int, longest: int) -> int:
        """For a batch whose longest prompt has `prompt` rows, and its longest completion `longest` with its prompt."""
        device = weights.embed_VH.device
        if self._room is None:
            # Asked once: what a running job has taken itself is not free any more.
            self._room = free_bytes(device) * SHARE / self._sharing
        kept, recomputed = bytes_per_row(weights), bytes_per_row(weights, recompute=True)
        rows, recompute = micro_batch(kept, recomputed, prompt, longest, self._room, device.type, self.recompute)
        if recompute and not self.recompute:
            self._recompute(f"a completion of {longest} tokens, its prompt included, takes much of the free memory")
        self._latest = rows if self.most is None else min(rows, self.most)
        return self._latest

    def shrink(self, longest: int) -> None:
        """After running out of memory; `longest` as in `rows`.

        Raises ModelError when not even one completion fits with everything else given up.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self._latest > longest:
            self.most = self._latest // 2
            self.notice(f"memory ran out: from now on at most {self.most} tokens are trained on at a time")
        elif not self.recompute:
            self._recompute("memory ran out")
        else:
            raise ModelError(
                f"not enough memory to train on one completion of {longest} tokens, its prompt included. A shorter "
                "sampling_params.max_tokens, a lower rank or a smaller base model needs less"
            )

    def _recompute(self, why: str) -> None:
        self.recompute = True
        self.notice(f"{why}: from now on each layer is computed twice in a step, which is slower and takes less of it")


def out_of_memory(error: BaseException) -> bool:
    """Whether it says so; torch's allocator of CPU memory raises a plain RuntimeError."""
    told = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in told or "not enough memory" in told)
    )
