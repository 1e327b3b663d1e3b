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
SHARE = 1 / 4  # of the free memory that copies may take

# Internal to torch, whose compiler uses them; so they are looked for, and done without where they are not.
_onednn = torch.ops.mkldnn
HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and all(hasattr(_onednn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
)


class Blocked:
    """Multiplies with the linear layers of `weights` and with the first `vocab` rows of its head, copied or not."""

    def __init__(self, weights: Weights, vocab: int) -> None:
        self._weights, self._vocab = weights, vocab
        self._copies: dict[int, Tensor] = {}  # by the address of what was copied

    def make(self, rows: int) -> None:
        """Copies for products with about so many rows, unless there are some, they would not pay or memory is short."""
        like = self._weights.embed_VH
        if self._copies or rows < FEWEST_ROWS or not (HAS_ONEDNN and like.is_cpu and like.dtype == torch.float32):
            return
        originals = [projection.weight_OI for projection in self._weights.projections]
        originals.append(self._weights.head_VH[: self._vocab])
        layer = sum(projection.base_OI.nbytes for projection in self._weights.layers[0].projections)
        if layer >= LEAST_BYTES and sum(w_OI.nbytes for w_OI in originals) <= SHARE * free_bytes(like.device):
            self._copies = {w_OI.data_ptr(): _onednn._reorder_linear_weight(w_OI, rows) for w_OI in originals}

    def drop(self) -> None:
        """Gives the memory back. To be called when the weights change, too."""
        self._copies = {}

    def product(self, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + b, N x O."""
        copy = self._copies.get(weight_OI.data_ptr())
        if copy is None:
            return linear(x_NI, weight_OI, bias_O)
        y_NO: Tensor = _onednn._linear_pointwise(x_NI, copy, bias_O, "none", [], "")
        return y_NO
