"""Copies of the weights in the layout in which a CPU multiplies few rows fastest, for as long as a batch is sampled.

A decode step is almost nothing but products of some dozen rows with every weight once. Of weights beyond the CPU's
caches oneDNN, which torch brings, makes these 1.3 to 1.6 times as fast once they lie in its own blocks
(docs/benchmarks.md). The copies are made when a batch begins and dropped when it ends: the memory is then the update's.
Whether there are copies depends on the model and the number of rows alone, so that a run repeated gives the same bits;
free memory matters only where it is short.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn.functional import linear

from rewardsmith.rollout.memory import free_bytes
from rewardsmith.rollout.model.weights import Weights

FEWEST_ROWS = 16  # with fewer, reading the weights takes most of the time, and making copies would not pay
LEAST_BYTES = 4 * 2**20  # of a layer; smaller ones stay in a CPU's caches and gain nothing
SHARE = 1 / 4  # of the free memory that the copies of all processes may take

# Internal to torch, whose compiler uses them; so they are looked for, and done without where they are not.
_onednn = torch.ops.mkldnn
HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and all(hasattr(_onednn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
)


def most_bytes(free: int, processes: int = 1) -> int:
    """What the copies of each process may take of `free` bytes that they share: each makes copies of its own."""
    return int(SHARE * free / processes)


def bytes_of_copies(linear: int, layers: int, head: int, rows: int, most: int) -> int:
    """What copies of float32 weights on a CPU take, 0 where none are made.

    `linear` are the bytes of all `layers`, `head` those of the head, `rows` the sequences that are sampled at a time.
    """
    pays = HAS_ONEDNN and rows >= FEWEST_ROWS and linear >= LEAST_BYTES * layers
    return linear + head if pays and linear + head <= most else 0


class Blocked:
    """Multiplies with the linear layers of `weights` and with the first `vocab` rows of its head, copied or not.

    `most` is what copies may take, in bytes; None: a share of what is free when a batch begins.
    """

    def __init__(self, weights: Weights, vocab: int, most: int | None = None) -> None:
        self._weights, self._vocab, self._most = weights, vocab, most
        self._copies: dict[int, Tensor] = {}  # by the address of what was copied
        self._decided = False

    def make(self, rows: int) -> None:
        """Copies for products with about so many rows; none when they would not pay or memory is short."""
        if self._decided or rows < FEWEST_ROWS:
            return
        self._decided = True
        weights, like = self._weights, self._weights.embed_VH
        if not (like.is_cpu and like.dtype == torch.float32):
            return
        head_VH = weights.head_VH[: self._vocab]
        linear = sum(projection.base_OI.nbytes for projection in weights.projections)
        most = most_bytes(free_bytes(like.device)) if self._most is None else self._most
        if bytes_of_copies(linear, len(weights.layers), head_VH.nbytes, rows, most):
            originals = [*(projection.weight_OI for projection in weights.projections), head_VH]
            self._copies = {w_OI.data_ptr(): _onednn._reorder_linear_weight(w_OI, rows) for w_OI in originals}

    def drop(self) -> None:
        """Gives the memory back. To be called when the weights change, too."""
        self._copies, self._decided = {}, False

    def product(self, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + b, N x O."""
        copy = self._copies.get(weight_OI.data_ptr())
        if copy is None:
            return linear(x_NI, weight_OI, bias_O)
        y_NO: Tensor = _onednn._linear_pointwise(x_NI, copy, bias_O, "none", [], "")
        return y_NO
