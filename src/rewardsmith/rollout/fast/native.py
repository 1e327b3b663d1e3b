"""`kernels.c` as the kernels of a decode step, through ctypes: float32, whole tensors where not said otherwise.

Addresses are all that crosses over, so every tensor is checked here to be what the C code takes it for.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from rewardsmith.rollout.fast import compiler
from rewardsmith.rollout.fast.attention import Rotary, Rows, Tables
from rewardsmith.rollout.fast.cache import PAGE, Cache
from rewardsmith.rollout.fast.compiler import Unavailable
from rewardsmith.rollout.model.architecture import Architecture
from rewardsmith.rollout.model.layers import Product
from rewardsmith.rollout.model.projection import Projection

if TYPE_CHECKING:
    from rewardsmith.rollout.fast.kernels import DecodeOps

__all__ = ["NativeKernels", "NativeOps", "Unavailable"]

_SCRATCH = 2**16  # floats: queries and scores of the rows of a prompt that are attended to at once, within a L2 cache
_STRETCH = 64  # ids summed up at once when sampling

_address, _long, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Attention(ctypes.Structure):
    """`Attention` in kernels.c, field by field."""

    _fields_ = [
        *((name, _address) for name in ("q", "k", "v", "out")),
        *((name, _long) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, _address) for name in ("cos", "sin", "keys", "values", "slot", "group", "length")),
        *((name, _address) for name in ("own_pages", "prompt_pages", "prompt_length")),
        *((name, _long) for name in ("own_columns", "prompt_columns", "rows", "heads", "kv_heads", "dim")),
        *((name, _long) for name in ("padded_dim", "rotary", "window")),
        *(("scale", _float), ("softcap", _float), ("scratch", _address), ("scratch_size", _long)),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = compiler.load(Path(__file__).with_name("kernels.c"))
    arguments = {
        "attend": [_address],
        "norm": [_address, _long, _address, _float, _address, _long, _long, _long],
        "add_norm": [_address, _address, _address, _float, _address, _long, _long],
        "gate": [_address, _address, _long, _long, _long],
        "sample": [_address, _long, _long, _long, *[_address] * 6],
    }
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


class NativeOps:
    """`layers.Ops` for inference. `add_norm` adds in place."""

    def __init__(self) -> None:
        self._library = _library()
        self.product: Product = linear

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Rows x width, or rows x heads x width where heads stand side by side."""
        width = x.shape[-1]
        inner = 1 if x.ndim == 2 else x.shape[1]
        _check(weight)
        _check_rows(x)
        out = torch.empty(x.shape)
        self._library.norm(x.data_ptr(), x.stride(0), weight.data_ptr(), epsilon, out.data_ptr(), len(x), inner, width)
        return out

    def linear(self, x: Tensor, projection: Projection) -> Tensor:
        y = self.product(x, projection.weight_OI, projection.bias_O)
        return y if projection.merged else projection.add_low_rank(x, y)

    def gate(self, gate_up: Tensor, kind: str) -> Tensor:
        _check(gate_up)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, width)
        self._library.gate(gate_up.data_ptr(), out.data_ptr(), rows, width, ("silu", "gelu_tanh").index(kind))
        return out

    def add_norm(self, x: Tensor, more: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        _check(x, more, weight)
        out = torch.empty(x.shape)
        self._library.add_norm(
            x.data_ptr(), more.data_ptr(), weight.data_ptr(), epsilon, out.data_ptr(), len(x), x.shape[1]
        )
        return x, out


class NativeKernels:
    """`kernels.Kernels` in native code. Raises Unavailable where that cannot be compiled."""

    name = "native"

    def __init__(self, architecture: Architecture) -> None:
        self.ops: DecodeOps = NativeOps()
        self._library = _library()
        self._architecture = architecture
        self._scratch = torch.empty(_SCRATCH)
        self._pool: ThreadPoolExecutor | None = None
        self._call = _Attention(
            heads=architecture.heads,
            kv_heads=architecture.kv_heads,
            dim=architecture.head_dim,
            scale=architecture.attention_scale,
            softcap=architecture.attention_softcap or 0.0,
        )
        self._call_address = ctypes.addressof(self._call)

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
        call = self._call
        if layer == 0:
            self._set_step(cache, tables, rows)
        cos_PF, sin_PF = rotary.tables(layer)
        call.cos, call.sin, call.rotary = cos_PF.data_ptr(), sin_PF.data_ptr(), cos_PF.shape[1]
        call.keys, call.values = cache.keys[layer].data_ptr(), cache.values[layer].data_ptr()
        call.window = self._architecture.layers[layer].window or 0
        for name, x_NHD in (("q", q_NHD), ("k", k_NKD), ("v", v_NKD)):
            _check_rows(x_NHD)
            setattr(call, name, x_NHD.data_ptr())
            setattr(call, f"{name}_stride", x_NHD.stride(0))
        out_NHD = torch.empty(q_NHD.shape)
        call.out = out_NHD.data_ptr()
        threads = min(torch.get_num_threads(), call.rows)
        if threads == 1:
            self._library.attend(self._call_address)
        else:
            self._attend_in_threads(threads)
        return out_NHD

    def _attend_in_threads(self, threads: int) -> None:
        """Each thread takes some of the rows; ctypes lets go of Python's lock."""
        call, width = self._call, self._call.heads * self._call.dim
        scratch = torch.empty(threads, call.scratch_size)
        per_row = {"slot": 8, "group": 8, "length": 8, "out": 4 * width}
        per_row |= {name: 4 * getattr(call, f"{name}_stride") for name in "qkv"}
        parts = []
        for i in range(threads):
            part = _Attention.from_buffer_copy(call)
            begin, end = call.rows * i // threads, call.rows * (i + 1) // threads
            part.rows, part.scratch = end - begin, scratch[i].data_ptr()
            for name, size in per_row.items():
                setattr(part, name, getattr(call, name) + begin * size)
            parts.append(part)
        self._pool = self._pool or ThreadPoolExecutor(torch.get_num_threads(), "attention")
        list(self._pool.map(lambda part: self._library.attend(ctypes.addressof(part)), parts))

    def _set_step(self, cache: Cache, tables: Tables, rows: Rows) -> None:
        """What is the same for all layers of a step."""
        call = self._call
        fields = {
            "slot": rows.slot_N,
            "group": rows.group_N,
            "length": rows.length_N,
            "own_pages": tables.own_pages_SM,
            "prompt_pages": tables.prompt_pages_GM,
            "prompt_length": tables.prompt_length_G,
        }
        for name, tensor in fields.items():
            assert tensor.dtype == torch.int64 and tensor.is_contiguous()
            setattr(call, name, tensor.data_ptr())
        _check(cache.keys, cache.values)
        call.own_columns, call.prompt_columns = tables.own_pages_SM.shape[1], tables.prompt_pages_GM.shape[1]
        call.rows, call.padded_dim = len(rows), cache.padded_dim
        shape = self._architecture
        width = (tables.own_pages_SM.shape[1] + tables.prompt_pages_GM.shape[1] + 2) * PAGE
        one_row = shape.heads // shape.kv_heads * (width + shape.head_dim + cache.padded_dim + 1)
        if one_row > len(self._scratch):
            self._scratch = torch.empty(one_row)
        call.scratch, call.scratch_size = self._scratch.data_ptr(), len(self._scratch)

    def sample(self, logits_NV: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        _check_rows(logits_NV)
        _check(rows.temperature_N)
        count, vocab = logits_NV.shape
        sums = torch.empty(vocab // _STRETCH + 1, dtype=torch.float64)
        ids_N, logps_N = torch.empty(count, dtype=torch.int64), torch.empty(count)
        self._library.sample(
            logits_NV.data_ptr(),
            logits_NV.stride(0),
            count,
            vocab,
            rows.temperature_N.data_ptr(),
            rows.seed_N.data_ptr(),
            rows.length_N.data_ptr(),
            sums.data_ptr(),
            ids_N.data_ptr(),
            logps_N.data_ptr(),
        )
        return ids_N, logps_N


def _check(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.dtype == torch.float32 and x.is_cpu and x.is_contiguous()


def _check_rows(x: Tensor) -> None:
    """Rows, or rows of heads, that are whole in themselves but may have others between them."""
    assert x.dtype == torch.float32 and x.is_cpu and x.stride(-1) == 1
    assert x.ndim == 2 or (x.ndim == 3 and x.stride(1) == x.shape[2])
