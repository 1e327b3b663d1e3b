"""Linear layers of one input as one matrix product: pristine base, bound adapter, and the merged copy of both.

`weights` makes them of a model and keeps them; that they hold what they should is proved in `delivery`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewardsmith.rollout.model import delivery

MERGED_AT_ONCE = 2**18  # numbers of the product that wait in a cache to be added


@dataclass(eq=False)
class Part:
    """One linear layer of the model: rows `start` to `stop` of a fused projection; with an adapter, A and B.

    `merged_from` is a sample of the adapter that the merged copy was built from: the first rows of B and A.
    """

    name: str
    start: int
    stop: int
    a_RI: Tensor | None = None
    b_OR: Tensor | None = None
    merged_from: Tensor | None = None

    def sample(self) -> Tensor:
        assert self.a_RI is not None and self.b_OR is not None
        return torch.cat([self.b_OR[0], self.a_RI[0]])


@dataclass(eq=False)
class Projection:
    """Linear layers of one input as one. `weight_OI` is what is multiplied with: the base, or the merged copy.

    One layout for both, rows of outputs: for decoding, [in, out] gained less than 5 % on the sizes measured.
    """

    base_OI: Tensor
    bias_O: Tensor | None
    parts: list[Part]
    scaling: float = 0.0
    merged_OI: Tensor | None = None
    row_checks_O: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.row_checks_O = delivery.row_checks(self.base_OI)

    @property
    def merged(self) -> bool:
        """Whether `weight_OI` has the adapter in it."""
        return self.merged_OI is not None or not self.bound

    @property
    def weight_OI(self) -> Tensor:
        return self.base_OI if self.merged_OI is None else self.merged_OI

    @property
    def bound(self) -> list[Part]:
        return [part for part in self.parts if part.a_RI is not None]

    def add_low_rank(self, x: Tensor, y: Tensor) -> Tensor:
        """y + scaling * B A x, written into `y`; the products in the adapter's precision, which may be wider."""
        for part in self.bound:
            assert part.a_RI is not None and part.b_OR is not None
            low_rank = (x.to(part.a_RI.dtype) @ part.a_RI.T) @ part.b_OR.T
            y[..., part.start : part.stop].add_(low_rank, alpha=self.scaling)
        return y

    def merge(self) -> None:
        """The merged copy from the pristine base and the bound adapter, into the memory `Weights.bind` made for it."""
        if self.merged_OI is None:
            return
        for part in self.bound:
            assert part.a_RI is not None and part.b_OR is not None and part.merged_from is not None
            at_once = max(1, MERGED_AT_ONCE // self.base_OI.shape[1])
            for start in range(part.start, part.stop, at_once):
                rows = slice(start, min(start + at_once, part.stop))
                # Not by addmm, which may add to the base product by product and round each time.
                product = part.b_OR[rows.start - part.start : rows.stop - part.start] @ part.a_RI
                torch.add(self.base_OI[rows], product, alpha=self.scaling, out=self.merged_OI[rows])
            torch.cat([part.b_OR[0], part.a_RI[0]], out=part.merged_from)
