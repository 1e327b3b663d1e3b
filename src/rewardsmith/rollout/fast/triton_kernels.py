"""The kernels of a decode step on CUDA: attention over the cache in Triton, everything else in torch.

Nothing here waits for the device, so that a whole step can be captured as a CUDA graph (`graphs`). Imported on CUDA
only. Never run on a GPU so far: Triton's interpreter runs it in the tests where Triton is installed.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewardsmith.rollout.fast.attention import Rotary, Rows, Tables, store_prompts
from rewardsmith.rollout.fast.cache import PAGE, Cache
from rewardsmith.rollout.fast.kernels import TorchKernels
from rewardsmith.rollout.model.architecture import Architecture


class TritonKernels(TorchKernels):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.name = "triton"

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
        shape = self._architecture
        own_N = rows.length_N - 1
        position_N = tables.prompt_length_G[rows.group_N] + own_N
        page_N = tables.own_pages_SM[rows.slot_N, own_N // PAGE]
        store_prompts(cache, layer, page_N, own_N % PAGE, rotary.rotate(layer, k_NKD, position_N), v_NKD)
        q_NHD = rotary.rotate(layer, q_NHD, position_N).contiguous()
        out_NHD = torch.empty_like(q_NHD)
        queries = shape.heads // shape.kv_heads
        _decode_attention[(len(rows), shape.kv_heads)](
            q_NHD,
            cache.keys[layer],
            cache.values[layer],
            out_NHD,
            rows.slot_N,
            rows.group_N,
            rows.length_N,
            tables.own_pages_SM,
            tables.prompt_pages_GM,
            tables.prompt_length_G,
            tables.own_pages_SM.shape[1],
            tables.prompt_pages_GM.shape[1],
            shape.attention_scale,
            SOFTCAP=shape.attention_softcap or 0.0,
            WINDOW=shape.layers[layer].window or 0,
            KV_HEADS=shape.kv_heads,
            QUERIES=queries,
            DIM=shape.head_dim,
            PADDED=cache.padded_dim,
            PAGE=PAGE,
            # Sizes that matrix units take: powers of two, 16 at least.
            BLOCK_Q=max(16, triton.next_power_of_2(queries)),
            BLOCK_D=max(16, triton.next_power_of_2(shape.head_dim)),
        )
        return out_NHD


@triton.jit
def _page(
    q, keys, values, page, head, first, end, at, most, total, mixed, scale,
    SOFTCAP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One page more in the running softmax. Its first token is number `at` of those that `first` and `end` count."""
    tokens = tl.arange(0, PAGE)
    dims = tl.arange(0, BLOCK_D)
    seen = (at + tokens >= first) & (at + tokens < end)
    k = tl.load(
        keys + (page * KV_HEADS + head) * DIM * PAGE + dims[:, None] * PAGE + tokens[None, :],
        mask=(dims[:, None] < DIM) & seen[None, :],
        other=0.0,
    )
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if SOFTCAP > 0:
        scores = SOFTCAP * (1 - 2 / (tl.exp(2 * scores / SOFTCAP) + 1))
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, 1))
    weights = tl.exp(scores - higher[:, None])
    shrink = tl.exp(most - higher)
    v = tl.load(
        values + (page * KV_HEADS + head) * PAGE * PADDED + tokens[:, None] * PADDED + dims[None, :],
        mask=seen[:, None] & (dims[None, :] < DIM),
        other=0.0,
    )
    mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, 1), mixed


@triton.jit
def _decode_attention(
    q_NHD, keys, values, out_NHD, slot_N, group_N, length_N, own_pages, prompt_pages, prompt_length,
    own_columns, prompt_columns, scale,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, PAGE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per row and kv head. A prompt's pages are read by each of its rows, out of the device's cache."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slot_N + row)
    group = tl.load(group_N + row)
    length = tl.load(length_N + row)
    prompt = tl.load(prompt_length + group)
    first = prompt * 0
    if WINDOW > 0:
        first = tl.maximum(prompt + length - WINDOW, 0)

    queries = tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, BLOCK_D)
    places = ((row * KV_HEADS + head) * QUERIES + queries[:, None]) * DIM + dims[None, :]
    inside = (queries[:, None] < QUERIES) & (dims[None, :] < DIM)
    q = tl.load(q_NHD + places, mask=inside, other=0.0)
    most = tl.full([BLOCK_Q], -1e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for n in range(first // PAGE, (prompt + PAGE - 1) // PAGE):
        page = tl.load(prompt_pages + group * prompt_columns + n)
        most, total, mixed = _page(
            q, keys, values, page, head, first, prompt, n * PAGE, most, total, mixed, scale,
            SOFTCAP, KV_HEADS, DIM, PADDED, PAGE, BLOCK_D,
        )  # fmt: skip
    own_first = tl.maximum(first - prompt, 0)
    for n in range(own_first // PAGE, (length + PAGE - 1) // PAGE):
        page = tl.load(own_pages + slot * own_columns + n)
        most, total, mixed = _page(
            q, keys, values, page, head, own_first, length, n * PAGE, most, total, mixed, scale,
            SOFTCAP, KV_HEADS, DIM, PADDED, PAGE, BLOCK_D,
        )  # fmt: skip
    tl.store(out_NHD + places, (mixed / total[:, None]).to(q.dtype), mask=inside)
