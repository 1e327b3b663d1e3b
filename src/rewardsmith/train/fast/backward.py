"""The token-wise operations of a decoder with a backward of their own: norm, linear layer with LoRA, gate.

Only the adapter learns, so no gradient of a base weight is ever computed; those of A and B are added up in
`AdapterGradient` as the backward pass goes by. A linear layer keeps no input that can be made again from what is kept
anyway: norms and gates are recomputed. `layers.run` puts these together, `gradient` drives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import gelu, linear, silu

from rewardsmith.rollout.adapter import tensor_names
from rewardsmith.rollout.model.layers import PlainOps
from rewardsmith.rollout.model.weights import Projection, Weights

aten = torch.ops.aten


class BaseOps(PlainOps):
    """The reference policy: the same model without its adapter. For inference: no gradient."""

    def linear(self, x: Tensor, projection: Projection) -> Tensor:
        return linear(x, projection.base_OI, projection.bias_O)


@dataclass(eq=False)
class LowRank:
    """One projection's adapter as the backward pass reads and fills it: the A of all S ranks of its parts stacked.

    All products are in the adapter's precision, which may be wider than the weights', as they are in the forward pass.
    The gradients lack the factor `scaling`. B's is kept transposed: the product is several times faster that way.
    """

    projection: Projection
    a_SI: Tensor = field(init=False)
    a_grad_SI: Tensor = field(init=False)
    b_grads_RO: list[Tensor] = field(init=False)
    ranks: list[slice] = field(init=False)

    def __post_init__(self) -> None:
        bound = self.parts
        self.a_SI = torch.cat([part.a_RI for part in bound])
        self.a_grad_SI = torch.zeros_like(self.a_SI)
        self.b_grads_RO = [torch.zeros_like(part.b_OR.T, memory_format=torch.contiguous_format) for part in bound]
        self.ranks, start = [], 0
        for part in bound:
            self.ranks.append(slice(start, start + len(part.a_RI)))
            start += len(part.a_RI)

    @property
    def parts(self) -> list[Any]:
        return self.projection.bound

    def add(self, x_NI: Tensor, dy_NO: Tensor) -> Tensor:
        """Adds the gradients of one micro-batch. Returns dY B, N x S."""
        x_NI = x_NI.to(self.a_SI.dtype)
        ax_NS = x_NI @ self.a_SI.T
        dyb_NS = torch.empty_like(ax_NS)
        for part, ranks, b_grad_RO in zip(self.parts, self.ranks, self.b_grads_RO, strict=True):
            dy_NP = dy_NO[:, part.start : part.stop].to(ax_NS.dtype)
            torch.mm(dy_NP, part.b_OR, out=dyb_NS[:, ranks])
            b_grad_RO.addmm_(ax_NS[:, ranks].T, dy_NP)
        self.a_grad_SI.addmm_(dyb_NS.T, x_NI)
        return dyb_NS


class AdapterGradient:
    """The gradient of all bound parts, zero at first."""

    def __init__(self, weights: Weights) -> None:
        self._scaling = weights.scaling
        self.low_rank = {projection: LowRank(projection) for projection in weights.projections if projection.bound}

    def add_to(self, gradients: Mapping[str, Tensor]) -> None:
        """Adds it to tensors that have the names and shapes of `Weights.adapter`."""
        for low_rank in self.low_rank.values():
            for part, ranks, b_grad_RO in zip(low_rank.parts, low_rank.ranks, low_rank.b_grads_RO, strict=True):
                a_name, b_name = tensor_names(part.name)
                gradients[a_name].add_(low_rank.a_grad_SI[ranks], alpha=self._scaling)
                gradients[b_name].add_(b_grad_RO.T, alpha=self._scaling)


class TrainedOps:
    """`layers.Ops` whose results can be differentiated; gradients of the adapter go to `gradient`."""

    def __init__(self, gradient: AdapterGradient) -> None:
        self._gradient = gradient
        device = next(iter(gradient.low_rank)).base_OI.device
        # The embeddings need no gradient; this makes autograd start at the first layer that has an adapter.
        self._start = torch.zeros((), device=device, requires_grad=True)
        self._latest: tuple[Tensor, Remake] | None = None

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y: Tensor
        y, scale = _Norm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
        self._latest = y, Remake(_normed, (x.detach(), scale, weight))
        return y

    def add_norm(self, x: Tensor, more: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        x, y, scale = _AddNorm.apply(x, more, weight, epsilon)  # type: ignore[no-untyped-call]
        self._latest = y, Remake(_normed, (x.detach(), scale, weight))
        return x, y

    def gate(self, gate_up: Tensor, kind: str) -> Tensor:
        y: Tensor = _Gate.apply(gate_up, kind)  # type: ignore[no-untyped-call]
        self._latest = y, Remake(partial(_gated, kind=kind), (gate_up.detach(),))
        return y

    def linear(self, x: Tensor, projection: Projection) -> Tensor:
        low_rank = self._gradient.low_rank.get(projection)
        start, remake = None, None
        if low_rank is not None:
            start = self._start
            latest, self._latest = self._latest, None
            remake = latest[1] if latest is not None and latest[0] is x else Remake(_itself, (x.detach(),))
        y: Tensor = _Linear.apply(x, start, projection, low_rank, remake)  # type: ignore[no-untyped-call]
        return y


@dataclass(frozen=True)
class Remake:
    """How to compute a tensor again: a function and what it takes."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def _itself(x: Tensor) -> Tensor:
    return x


def _normed(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    if x.dtype == weight.dtype == scale.dtype:
        return torch.mul(x, scale).mul_(weight)
    return ((x * scale).to(weight.dtype) * weight).to(x.dtype)  # rounded where `layers.Ops` says


def _gated(gate_up: Tensor, kind: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return (silu(gate) if kind == "silu" else gelu(gate, approximate="tanh")).mul_(up)


class _Linear(Function):
    """y = x W' + b, W' the base with the adapter in it, merged or beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        start: Tensor | None,
        projection: Projection,
        low_rank: LowRank | None,
        remake: Remake | None,
    ) -> Tensor:
        ctx.projection, ctx.low_rank = projection, low_rank
        if remake is not None:
            ctx.function = remake.function
            ctx.save_for_backward(*remake.tensors)
        return PlainOps().linear(x, projection)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        projection, low_rank = ctx.projection, ctx.low_rank
        dyb_NS = None if low_rank is None else low_rank.add(ctx.function(*ctx.saved_tensors), dy)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ projection.weight_OI
            if dyb_NS is not None and not projection.merged:
                if dx.dtype == dyb_NS.dtype:
                    dx.addmm_(dyb_NS, low_rank.a_SI, alpha=projection.scaling)
                else:
                    dx.add_(dyb_NS @ low_rank.a_SI, alpha=projection.scaling)
        return dx, None, None, None, None


def _scale(x: Tensor, epsilon: float) -> Tensor:
    """1 / the root mean square over the last dimension, in float32 at least."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(norm.square().div_(x.shape[-1]).add_(epsilon))


def _norm_backward(dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """d/dx of x * scale * weight, scale being 1 / the root mean square of x."""
    d = (dy * weight).to(scale.dtype)
    wide = x.to(scale.dtype)
    along = (d * wide).mean(-1, keepdim=True).mul_(scale.pow(3))
    return d.mul_(scale).addcmul_(wide, along, value=-1).to(dy.dtype)


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        scale = _scale(x, epsilon)
        ctx.save_for_backward(x, scale, weight)
        ctx.mark_non_differentiable(scale)
        return _normed(x, scale, weight), scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _norm_backward(dy, *ctx.saved_tensors), None, None


class _AddNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        x = x + more
        scale = _scale(x, epsilon)
        ctx.save_for_backward(x, scale, weight)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        return x, _normed(x, scale, weight), scale

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is not None:
            through = _norm_backward(dy, *ctx.saved_tensors)
            dx = through if dx is None else through.add_(dx)
        return dx, dx, None, None


class _Gate(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kind = kind
        return _gated(gate_up, kind)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        d = torch.empty_like(gate_up)
        d_gate, d_up = d.chunk(2, -1)
        if ctx.kind == "silu":
            torch.mul(silu(gate), dy, out=d_up)
            aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        else:
            torch.mul(gelu(gate, approximate="tanh"), dy, out=d_up)
            aten.gelu_backward.grad_input(dy * up, gate, approximate="tanh", grad_input=d_gate)
        return d, None
