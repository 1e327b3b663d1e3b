"""A decoder's layers, written once for prefill, decode and training.

What differs between the three comes in: `attend` turns q, k, v of the fed tokens into attention outputs (rotary
positions, cache and masks are its business), `ops` are the token-wise operations, plain ones or such with a backward
of their own. Tokens are packed: N rows, whatever sequences they belong to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from rewardsmith.rollout.model.projection import Projection
from rewardsmith.rollout.model.weights import Weights

# (index of the layer, q_NHD, k_NKD, v_NKD) -> out_NHD: H query heads, K key and value heads of D numbers.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Product(Protocol):
    def __call__(self, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, /) -> Tensor:
        """x W^T + b, N x O."""


class Ops(Protocol):
    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Root-mean-square norm over the last dimension, computed in float32 at least.

        It is rounded to the precision of `x` before the multiplication by `weight`, or, where `weight` is wider than
        `x` (Gemma in 16 bits), after it. The result has the precision of `x`.
        """

    def linear(self, x: Tensor, projection: Projection) -> Tensor: ...

    def gate(self, gate_up: Tensor, kind: str) -> Tensor:
        """activation(first half) * second half of the last dimension."""

    def add_norm(self, x: Tensor, more: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """(x + more, norm of that)."""


class PlainOps:
    """For inference: no gradient. `product` is how `linear` multiplies."""

    def __init__(self) -> None:
        self.product: Product = linear

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return (wide.to(weight.dtype) * weight).to(x.dtype)

    def linear(self, x: Tensor, projection: Projection) -> Tensor:
        y = self.product(x, projection.weight_OI, projection.bias_O)
        return y if projection.merged else projection.add_low_rank(x, y)

    def gate(self, gate_up: Tensor, kind: str) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return (silu(gate) if kind == "silu" else gelu(gate, approximate="tanh")) * up

    def add_norm(self, x: Tensor, more: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        x = x + more
        return x, self.norm(x, weight, epsilon)


def run(weights: Weights, ids_N: Tensor, attend: Attend, ops: Ops, last_rows: Tensor | None = None) -> Tensor:
    """Hidden states after the final norm, N x hidden, or of `last_rows` only, which spares the last layer's rest."""
    shape, epsilon = weights.architecture, weights.architecture.norm_epsilon
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    x = weights.embed_VH.index_select(0, ids_N)
    if shape.embed_scale != 1.0:
        x = x * shape.embed_scale
    layers = weights.layers
    h = ops.norm(x, layers[0].input_norm, epsilon)
    for i, layer in enumerate(layers):
        q, k, v = torch.split(ops.linear(h, layer.qkv), [q_width, kv_width, kv_width], -1)
        q, k, v = (torch.unflatten(t, -1, (-1, shape.head_dim)) for t in (q, k, v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = ops.norm(q, layer.q_norm, epsilon), ops.norm(k, layer.k_norm, epsilon)
        mixed = attend(i, q, k, v).flatten(-2)
        if last_rows is not None and i == len(layers) - 1:
            mixed, x = mixed.index_select(0, last_rows), x.index_select(0, last_rows)
        mixed = ops.linear(mixed, layer.out)
        if layer.post_attention_norm is not None:
            mixed = ops.norm(mixed, layer.post_attention_norm, epsilon)
        x, h = ops.add_norm(x, mixed, layer.mlp_norm, epsilon)
        more = ops.linear(ops.gate(ops.linear(h, layer.gate_up), shape.gate), layer.down)
        if layer.post_mlp_norm is not None:
            more = ops.norm(more, layer.post_mlp_norm, epsilon)
        after = layers[i + 1].input_norm if i + 1 < len(layers) else weights.norm
        x, h = ops.add_norm(x, more, after, epsilon)
    return h


def logits(weights: Weights, h_NH: Tensor, vocab: int, product: Product = linear) -> Tensor:
    """Over the first `vocab` ids; a model's ids beyond those of its tokenizer are padding."""
    logits_NV = product(h_NH, weights.head_VH[:vocab])
    cap = weights.architecture.logit_softcap
    return logits_NV if cap is None else (logits_NV / cap).tanh() * cap
