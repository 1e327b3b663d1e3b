"""The operations of a decode step, and which implementation of them runs: native code, or these ones in torch.

Both compute the same (a test holds them together); `choose` says why it is not the native one, where it is not.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rewardsmith.rollout.fast.attention import Rotary, Rows, Tables, decode_attention
from rewardsmith.rollout.fast.cache import Cache
from rewardsmith.rollout.model.architecture import Architecture
from rewardsmith.rollout.model.layers import Ops, PlainOps, Product
from rewardsmith.rollout.sampling import Cut, draw, log_probs, uniforms


class DecodeOps(Ops, Protocol):
    """`product` is how `linear` multiplies, for the decoder to replace."""

    product: Product


class Kernels(Protocol):
    """`name` is "native", "triton", or "torch: " and why."""

    name: str
    ops: DecodeOps

    def attend(
        self,
        rotary: Rotary,
        cache: Cache,
        tables: Tables,
        rows: Rows,
        layer: int,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
    ) -> Tensor:
        """As `attention.decode_attention`."""

    def sample(self, logits_NV: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The next id of each row from its whole distribution, and its log-prob."""


class TorchKernels:
    def __init__(self, architecture: Architecture, reason: str = "asked for") -> None:
        self.name = f"torch: {reason}"
        self.ops: DecodeOps = PlainOps()
        self._architecture = architecture

    def attend(
        self,
        rotary: Rotary,
        cache: Cache,
        tables: Tables,
        rows: Rows,
        layer: int,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
    ) -> Tensor:
        return decode_attention(self._architecture, rotary, cache, tables, rows, layer, q_NHD, k_NKD, v_NKD)

    def sample(self, logits_NV: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        logps_NV = log_probs(logits_NV, rows.temperature_N[:, None], logits_NV.shape[1])
        drawn = draw(logps_NV, uniforms(rows.seed_N, rows.length_N), Cut())
        return drawn.ids_B, drawn.logps_B


def choose(architecture: Architecture, like: Tensor) -> Kernels:
    """For weights of the type and on the device of `like`; compiles the native ones at first use."""
    if like.is_cuda:
        try:
            from rewardsmith.rollout.fast.triton_kernels import TritonKernels
        except ImportError:
            return TorchKernels(architecture, "Triton is not installed")
        return TritonKernels(architecture)
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return TorchKernels(architecture, f"weights are {str(like.dtype).removeprefix('torch.')} on {like.device}")
    from rewardsmith.rollout.fast.native import NativeKernels, Unavailable

    try:
        return NativeKernels(architecture)
    except Unavailable as reason:
        return TorchKernels(architecture, str(reason))
