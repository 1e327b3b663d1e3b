"""What a decoder computes while it samples: prompts once and whole, then one token per sequence at a time.

Linear layers see all rows packed; attention goes through the cache. Which sequences there are is `batch`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewardsmith.rollout.fast.attention import Rotary, Rows, Tables, causal_attention, store_prompts
from rewardsmith.rollout.fast.blocked import Blocked
from rewardsmith.rollout.fast.cache import PAGE, Cache
from rewardsmith.rollout.fast.graphs import Graphs
from rewardsmith.rollout.fast.kernels import Kernels
from rewardsmith.rollout.model.layers import logits, run
from rewardsmith.rollout.model.weights import Weights


@dataclass(eq=False)
class Prompt:
    """A prompt in use. `users` counts the sequences that need it; `hidden_H` is what the model made of its end."""

    ids: list[int]
    group: int = -1
    pages: list[int] = field(default_factory=list)
    hidden_H: Tensor | None = None
    users: int = 0


class Decoder:
    def __init__(self, weights: Weights, kernels: Kernels, vocab: int, blocked_bytes: int | None = None) -> None:
        self.weights, self.kernels, self.vocab = weights, kernels, vocab
        self.architecture = weights.architecture
        self.rotary = Rotary(weights.architecture, weights.embed_VH)
        self.cache = Cache(weights.architecture, weights.embed_VH)
        self._graphs = Graphs()
        self.blocked = Blocked(weights, vocab, blocked_bytes)
        kernels.ops.product = self.blocked.product

    def clear(self) -> None:
        """Gives all memory back, once no sequence is left."""
        self.cache.clear()
        self.blocked.drop()

    def read(self, prompts: Sequence[Prompt]) -> None:
        """Computes prompts in one forward; fills their pages and `hidden_H`."""
        lengths = [len(prompt.ids) for prompt in prompts]
        self.rotary.reserve(max(lengths))
        device = self.weights.embed_VH.device
        ids_N = torch.tensor([i for prompt in prompts for i in prompt.ids], device=device)
        position_N = torch.cat([torch.arange(length) for length in lengths]).to(device)
        page_N = torch.tensor([page for p in prompts for page in p.pages for _ in range(PAGE)])
        # Each prompt's last page may be wider than the prompt.
        filled = [torch.arange(len(p.pages) * PAGE) < len(p.ids) for p in prompts]
        page_N = page_N[torch.cat(filled)].to(device)

        def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
            q_NHD, k_NKD = (self.rotary.rotate(layer, x, position_N) for x in (q_NHD, k_NKD))
            store_prompts(self.cache, layer, page_N, position_N % PAGE, k_NKD, v_NKD)
            mixed = [
                causal_attention(self.architecture, layer, q_THD, k_TKD, v_TKD)
                for q_THD, k_TKD, v_TKD in zip(*(torch.split(x, lengths) for x in (q_NHD, k_NKD, v_NKD)), strict=True)
            ]
            return torch.cat(mixed)

        last_P = torch.tensor(lengths, device=device).cumsum(0) - 1
        hidden_PH = run(self.weights, ids_N, attend, self.kernels.ops, last_rows=last_P)
        for prompt, hidden_H in zip(prompts, hidden_PH, strict=True):
            prompt.hidden_H = hidden_H

    def step(self, rows: Rows, tables: Tables) -> Tensor:
        """Feeds each sequence its last token: hidden states, N x H. Positions must have been reserved in `rotary`."""
        self.blocked.make(len(rows))
        if self.kernels.name != "triton" or not rows.slot_N.is_cuda:
            return self._step(rows, tables)
        memory = [self.cache.keys, self.cache.values, self.weights.layers[0].qkv.weight_OI]
        memory += [tables.own_pages_SM, tables.prompt_pages_GM, tables.prompt_length_G]
        memory += [self.rotary.tables(layer)[0] for layer in range(len(self.architecture.layers))]
        return self._graphs.run(lambda rows: self._step(rows, tables), rows, memory)

    def _step(self, rows: Rows, tables: Tables) -> Tensor:
        def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
            return self.kernels.attend(self.rotary, self.cache, tables, rows, layer, q_NHD, k_NKD, v_NKD)

        return run(self.weights, rows.last_N, attend, self.kernels.ops)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        return logits(self.weights, hidden_NH, self.vocab, self.blocked.product)
