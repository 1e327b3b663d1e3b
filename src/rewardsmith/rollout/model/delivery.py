"""Proof that the weights hold the base that was loaded and, merged, the adapter that was delivered.

One row of each linear layer is looked at: of the base by its bits, of the merged copy by its value, which has to be
base + scaling * B A up to rounding. A look is cheap, so it is taken at every delivery; another row each time. The whole
adapter, all of A and B, is compared by `adapter.Fingerprint`. What an engine makes of these weights is not looked at:
copies in another layout (`fast.blocked`) come from them when a batch begins and are dropped at delivery. That it
computes with the right ones is seen by its log-probs, which the trainer compares with its own every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rewardsmith.rollout.model.projection import Part, Projection

CHUNK = 2**18  # numbers that are copied at a time
ODD = 6364136223846793005  # its powers look random (Knuth's multiplier for 64 bits)
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_checks(weight_OI: Tensor) -> Tensor:
    """One number for each row that a changed row changes too: its bits, each place times another power, added."""
    bits_OI = weight_OI.view(INTEGER[weight_OI.element_size()])
    factors_I = torch.full(weight_OI.shape[1:], ODD, device=weight_OI.device).cumprod(0)
    rows = max(1, CHUNK // weight_OI.shape[1])
    return torch.cat([(some_CI.to(torch.int64) * factors_I).sum(1) for some_CI in torch.split(bits_OI, rows)])


@dataclass(frozen=True)
class Look:
    """At row `number` of a projection, which is one of its `part`'s."""

    projection: Projection
    part: Part
    number: int

    @property
    def kind(self) -> tuple[int, int]:
        """Looks of one kind can be taken together: inputs of the layer, rank of the merged adapter."""
        rank = 0 if self.part.a_RI is None or self.part.merged_from is None else len(self.part.a_RI)
        return self.projection.base_OI.shape[1], rank


def faults(looks: Sequence[Look]) -> list[str]:
    """What is wrong where, in words; empty when nothing is."""
    kinds: dict[tuple[int, int], list[Look]] = {}
    for look in looks:
        kinds.setdefault(look.kind, []).append(look)
    right = []
    for (inputs, rank), some in kinds.items():
        at_once = max(1, CHUNK // (inputs * max(1, rank)))
        for batch in (some[start : start + at_once] for start in range(0, len(some), at_once)):
            right.append(_base_is_right(batch).all())
            if rank:
                right.append(_merged_is_right(batch).all())
    # One question to the device, whatever the number of layers.
    return [] if bool(torch.stack(right).all()) else [words for look in looks if (words := _fault(look))]


def _base_is_right(looks: Sequence[Look]) -> Tensor:
    """Whether the base has the bits it was loaded with, look by look."""
    rows_LI = torch.stack([look.projection.base_OI[look.number] for look in looks])
    return row_checks(rows_LI) == torch.stack([look.projection.row_checks_O[look.number] for look in looks])


def _merged_is_right(looks: Sequence[Look]) -> Tensor:
    """Whether the merged copy is base + scaling * B A, look by look."""
    _, off_LI, room_LI = _compare(looks)
    return (off_LI.abs() <= room_LI).all(1)


def _compare(looks: Sequence[Look]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of scaling * B A, how far the merged copy is from base plus that, how far rounding can bring it."""
    base_LI = torch.stack([look.projection.base_OI[look.number] for look in looks])
    merged_LI = torch.stack([_present(look.projection.merged_OI)[look.number] for look in looks])
    b_LR = torch.stack([_present(look.part.b_OR)[look.number - look.part.start] for look in looks])
    a_LRI = torch.stack([_present(look.part.a_RI) for look in looks])
    precision = torch.finfo(base_LI.dtype).eps
    wide = torch.promote_types(torch.promote_types(base_LI.dtype, a_LRI.dtype), torch.float32)
    base_LI, merged_LI, b_LR, a_LRI = (t.to(wide) for t in (base_LI, merged_LI, b_LR, a_LRI))
    scaling = looks[0].projection.scaling
    low_rank_LI = scaling * (b_LR[:, None] @ a_LRI).squeeze(1)
    # The sum is rounded once in the weights' precision, the products in theirs.
    size_LI = abs(scaling) * (b_LR.abs()[:, None] @ a_LRI.abs()).squeeze(1)
    room_LI = precision * (base_LI.abs() + low_rank_LI.abs()) + 8 * torch.finfo(wide).eps * size_LI
    return low_rank_LI, merged_LI - (base_LI + low_rank_LI), room_LI


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _fault(look: Look) -> str:
    """What is wrong there, as exactly as can be known; empty when nothing is."""
    projection, part, row = look.projection, look.part, look.number - look.part.start
    if not _base_is_right([look]):
        return f"the base weights of {part.name} changed since they were loaded (row {row})"
    if part.merged_from is None or _merged_is_right([look]):
        return ""
    low_rank_I, off_I, room_I = (tensor[0] for tensor in _compare([look]))
    added_I = off_I + low_rank_I
    times = float(added_I @ low_rank_I / (low_rank_I @ low_rank_I))
    if torch.equal(_present(projection.merged_OI)[look.number], projection.base_OI[look.number]):
        cause = "the adapter was never merged into them"
    elif not torch.equal(part.merged_from, part.sample()):
        cause = "they were not rebuilt since the adapter changed"
    elif bool(((added_I - times * low_rank_I).abs() <= 2 * room_I.max()).all()):
        cause = f"the adapter was merged times {times * projection.scaling:.4g}, not {projection.scaling:.4g}"
    else:
        cause = "they were written to since they were built"
    off = float(off_I.abs().max())
    return f"the merged weights of {part.name} are not base plus adapter: {cause} (row {row} is off by {off:.3g})"
