"""The plain engine: a transformers causal language model with its KV cache and one adapter of a PEFT model.

Slow enough to be obvious: the measure for `fast`, and the engine of models whose computation that one does not know.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from peft import PeftModel
from torch import LongTensor, Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedTokenizerBase

from rewardsmith.rollout.adapter import Fingerprint, adapter_tensors, take_over
from rewardsmith.rollout.engine import (
    Completion,
    check_logps,
    context_of,
    decoder,
    ends_in_stop,
    room_after,
    stop_ids,
    text_config,
    with_text,
)
from rewardsmith.rollout.sampling import Cut, GrowingSupport, draw, log_probs, uniforms

if TYPE_CHECKING:
    from rewardsmith.config import SamplingParamsConfig

CACHE_BYTES = 4 * 2**30  # keys and values of the completions sampled at once
COMPACT_BELOW = 0.75  # share of unfinished completions at which the finished ones are taken out of the batch


class PlainEngine:
    """Runs `adapter` of a PEFT model. `between_tokens` is called once per decode step and may raise to end it all."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: str = "rollout",
        between_tokens: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._decode = decoder(tokenizer)
        self._adapter = adapter
        self._between_tokens = between_tokens
        self._config = text_config(model)
        self._context = context_of(model)
        self.vocab = min(len(tokenizer), self._config.vocab_size)
        self._stop_ids = stop_ids(model, tokenizer)
        self.version = 0

    def load_adapter(self, tensors: Mapping[str, Tensor], version: int) -> None:
        take_over(adapter_tensors(self._model, self._adapter), tensors, version)
        self.version = version

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of(adapter_tensors(self._model, self._adapter))

    def generate(
        self, prompts: Sequence[list[int]], num_generations: int, params: SamplingParamsConfig, seeds: Sequence[int]
    ) -> Generator[tuple[int, list[Completion]], None, None]:
        """Gives the groups batch by batch. Raises ModelError when the model's logits are not numbers."""
        groups: list[list[Completion]] = [[] for _ in prompts]
        for chosen, part in self._batches(prompts, num_generations, params.max_tokens):
            seeds_B = [seeds[i * num_generations + n] for i in chosen for n in part]
            completions = self._sample([prompts[i] for i in chosen], len(part), params, seeds_B)
            for place, i in enumerate(chosen):
                groups[i] += completions[place * len(part) : (place + 1) * len(part)]
                if len(groups[i]) == num_generations:
                    yield i, groups[i]

    def _batches(
        self, prompts: Sequence[list[int]], num_generations: int, max_tokens: int
    ) -> Iterator[tuple[list[int], range]]:
        """What is sampled together: indices of prompts, neighbours in length, and which completions of each.

        As many as the cache has room for, at least one; a group that is too large alone comes in parts.
        """
        room = CACHE_BYTES // _cache_bytes_per_token(self._config)  # tokens
        whole = range(num_generations)
        batch: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            longest = len(prompts[i]) + min(max_tokens, room_after(prompts[i], self._context))
            if batch and (len(batch) + 1) * num_generations * longest > room:
                yield batch, whole
                batch = []
            rows = max(1, room // longest)
            if rows < num_generations:
                yield from (([i], whole[start : start + rows]) for start in range(0, num_generations, rows))
            else:
                batch.append(i)
        if batch:
            yield batch, whole

    @torch.no_grad()
    def _sample(
        self, prompts: list[list[int]], num_generations: int, params: SamplingParamsConfig, seeds: list[int]
    ) -> list[Completion]:
        # Here and not once per call: between two batches the caller may use the model with another adapter.
        self._model.set_adapter(self._adapter, inference_mode=True)
        self._model.eval()
        device, count = self._model.device, len(seeds)
        seeds_B = torch.tensor(seeds, device=device)
        stops = torch.tensor(self._stop_ids, device=device)
        limits = [min(params.max_tokens, room_after(prompt, self._context)) for prompt in prompts]
        limit_B = torch.tensor(limits, device=device).repeat_interleave(num_generations)
        longest = int(limit_B.max())
        ids_BT = torch.zeros(count, longest, dtype=torch.long, device=device)
        logps_BT = torch.zeros(count, longest, dtype=torch.float64, device=device)
        length_B = torch.zeros(count, dtype=torch.long, device=device)
        stopped_B = torch.zeros(count, dtype=torch.bool, device=device)
        cut = Cut(params.top_k, params.top_p, params.min_p)
        support_B = [GrowingSupport() for _ in seeds]

        batch = _Batch(self._model, prompts, num_generations, longest)
        logits_bV = batch.first_logits()
        rows_b = torch.arange(count, device=device)  # which completions are in the batch
        open_b = torch.ones(count, dtype=torch.bool, device=device)
        for position in range(longest):
            self._between_tokens()
            all_logps_bV = log_probs(logits_bV, params.temperature, self.vocab)
            drawn = draw(all_logps_bV, uniforms(seeds_B[rows_b], position), cut)
            ids_BT[rows_b, position] = drawn.ids_B
            logps_BT[rows_b, position] = drawn.logps_B.double()
            for place, possible in enumerate(drawn.support or []):
                if open_b[place]:
                    support_B[int(rows_b[place])].add(possible)
            stopping_b = open_b & torch.isin(drawn.ids_B, stops)
            if params.stop:
                for place, row in enumerate(rows_b.tolist()):
                    if open_b[place]:
                        before = prompts[row // num_generations][-1]
                        said = ids_BT[row, : position + 1].tolist()
                        stopping_b[place] |= ends_in_stop(said, before, self._decode, params.stop)
            stopped_B[rows_b[stopping_b]] = True
            closing_b = stopping_b | (open_b & (limit_B[rows_b] == position + 1))
            length_B[rows_b[closing_b]] = position + 1
            open_b &= ~closing_b
            still_open = int(open_b.sum())
            if not still_open:
                break
            drawn_b = drawn.ids_B
            if still_open < COMPACT_BELOW * len(rows_b):
                batch.keep(open_b)
                rows_b, drawn_b, open_b = rows_b[open_b], drawn_b[open_b], open_b[open_b]
            logits_bV = batch.next_logits(drawn_b)

        completions = []
        for i, (length, stopped) in enumerate(zip(length_B.tolist(), stopped_B.tolist(), strict=True)):
            ids, logps = ids_BT[i, :length].tolist(), logps_BT[i, :length].tolist()
            check_logps(logps)
            support = support_B[i].whole() if cut.acts else None
            completion = Completion(ids, logps, "stop" if stopped else "length", support=support)
            prompt = prompts[i // num_generations]
            completions.append(with_text(completion, prompt, self._decode, self._stop_ids, params.stop))
        return completions


class _Batch:
    """The KV cache of one batch: each prompt read once, its keys and values repeated for its group. No sampling."""

    def __init__(self, model: PeftModel, prompts: list[list[int]], num_generations: int, max_new: int) -> None:
        self._model = model
        self._prompts = prompts
        self._num_generations = num_generations
        self._longest = max(len(prompt) for prompt in prompts)
        # Prompts are padded on the left, so that all rows write the same column of the cache.
        self._seen_BT = torch.ones(len(prompts), self._longest + max_new, dtype=torch.long, device=model.device)
        for row_T, prompt in zip(self._seen_BT, prompts, strict=True):
            row_T[: self._longest - len(prompt)] = 0
        self._position_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        self._columns = self._longest
        # Finished rows stay in the batch for a while and must not run out of the positions a model knows.
        self._last_position = (context_of(model) or sys.maxsize) - 1
        self._cache = DynamicCache(config=text_config(model))

    def first_logits(self) -> Tensor:
        """Logits of the first new token, one row per completion."""
        ids = [[0] * (self._longest - len(prompt)) + prompt for prompt in self._prompts]
        seen_PT = self._seen_BT[:, : self._longest]
        logits_PV = self._forward(
            torch.tensor(ids, device=self._model.device), seen_PT, (seen_PT.cumsum(-1) - 1).clamp(min=0)
        )
        if self._num_generations == 1:
            return logits_PV
        rows_B = torch.arange(len(ids), device=self._model.device).repeat_interleave(self._num_generations)
        self._select(rows_B)
        return logits_PV[rows_B]

    def next_logits(self, ids_b: Tensor) -> Tensor:
        """Logits of the token after `ids_b`, the newest token of each row in the batch."""
        self._columns += 1
        logits_bV = self._forward(ids_b[:, None], self._seen_BT[:, : self._columns], self._position_B[:, None])
        self._position_B = (self._position_B + 1).clamp(max=self._last_position)
        return logits_bV

    def keep(self, open_b: Tensor) -> None:
        self._select(open_b.nonzero().squeeze(1))

    def _select(self, rows: Tensor) -> None:
        self._cache.reorder_cache(cast(LongTensor, rows))
        self._seen_BT, self._position_B = self._seen_BT[rows], self._position_B[rows]

    def _forward(self, ids_BT: Tensor, seen_BT: Tensor, positions_BT: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids_BT,
            attention_mask=seen_BT,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


def _cache_bytes_per_token(config: PretrainedConfig) -> int:
    """Keys and values of one token in all layers, at 4 bytes a number."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 4 * config.num_hidden_layers * heads * width)
