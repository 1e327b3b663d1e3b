"""Samples completions. `Engine` is what training and serving need of a sampler; `PlainEngine` is the built-in one.

The plain engine runs a transformers causal language model with its KV cache and one adapter of a PEFT model: slow
enough to be obvious, and the measure for anything faster. Prompts go in as ids, completions come out as ids with the
log-probs they were drawn with; text is made from the ids, never the other way round.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from peft import PeftModel
from torch import LongTensor, Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rewardsmith.config import SamplingParamsConfig
from rewardsmith.errors import DeliveryError, ModelError
from rewardsmith.rollout.adapter import Fingerprint, adapter_tensors
from rewardsmith.rollout.sampling import draw, log_probs, uniforms

CACHE_BYTES = 4 * 2**30  # keys and values of the completions sampled at once
COMPACT_BELOW = 0.75  # share of unfinished completions at which the finished ones are taken out of the batch


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `ids` includes the end-of-turn token that stopped it, `text` does not.

    `logps` are natural logs under the whole temperature-scaled distribution, one for each id.
    """

    ids: list[int]
    logps: list[float]
    finish_reason: Literal["stop", "length"]
    text: str


class Engine(Protocol):
    def generate(
        self, prompts: Sequence[list[int]], num_generations: int, params: SamplingParamsConfig, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """`num_generations` completions of each prompt; `seeds` has one number per completion, group by group."""

    def load_adapter(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Take over the policy's adapter. Raises DeliveryError when it does not fit."""

    def fingerprint(self) -> Fingerprint:
        """Of the adapter that the next completion is sampled with."""


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
        self._tokenizer = tokenizer
        self._adapter = adapter
        self._between_tokens = between_tokens
        self._config = text_config(model)
        self._context = context_of(model)
        self.vocab = min(len(tokenizer), self._config.vocab_size)
        self._stops = torch.tensor(stop_ids(model, tokenizer), device=model.device)
        self.version = 0

    def load_adapter(self, tensors: Mapping[str, Tensor], version: int) -> None:
        mine = adapter_tensors(self._model, self._adapter)
        if mine.keys() != tensors.keys():
            odd = sorted(mine.keys() ^ tensors.keys())
            raise DeliveryError(
                f"policy version {version} does not fit the engine's adapter: {len(odd)} names differ, first {odd[0]}"
            )
        for name, tensor in mine.items():
            if tensor.shape != tensors[name].shape:
                raise DeliveryError(
                    f"policy version {version} does not fit the engine's adapter: {name} has another shape"
                )
            tensor.copy_(tensors[name])
        self.version = version

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of(adapter_tensors(self._model, self._adapter))

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], num_generations: int, params: SamplingParamsConfig, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Raises ModelError when the model's logits are not numbers."""
        self._model.set_adapter(self._adapter, inference_mode=True)
        self._model.eval()
        groups: list[list[Completion]] = [[] for _ in prompts]
        for chosen, part in self._batches(prompts, num_generations, params.max_tokens):
            seeds_B = [seeds[i * num_generations + n] for i in chosen for n in part]
            completions = self._sample([prompts[i] for i in chosen], len(part), params, seeds_B)
            for place, i in enumerate(chosen):
                groups[i] += completions[place * len(part) : (place + 1) * len(part)]
        return groups

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
            longest = len(prompts[i]) + min(max_tokens, self._room(prompts[i]))
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

    def _sample(
        self, prompts: list[list[int]], num_generations: int, params: SamplingParamsConfig, seeds: list[int]
    ) -> list[Completion]:
        device, count = self._model.device, len(seeds)
        seeds_B = torch.tensor(seeds, device=device)
        limit_B = torch.tensor([min(params.max_tokens, self._room(prompt)) for prompt in prompts], device=device)
        limit_B = limit_B.repeat_interleave(num_generations)
        longest = int(limit_B.max())
        ids_BT = torch.zeros(count, longest, dtype=torch.long, device=device)
        logps_BT = torch.zeros(count, longest, device=device)
        length_B = torch.zeros(count, dtype=torch.long, device=device)

        decoder = _Decoder(self._model, prompts, num_generations, longest)
        logits_bV = decoder.first_logits()
        rows_b = torch.arange(count, device=device)  # which completions are in the batch
        open_b = torch.ones(count, dtype=torch.bool, device=device)
        for position in range(longest):
            self._between_tokens()
            all_logps_bV = log_probs(logits_bV, params.temperature, self.vocab)
            random_b = uniforms(seeds_B[rows_b], position)
            drawn_b = draw(all_logps_bV, random_b, top_k=params.top_k, top_p=params.top_p)
            ids_BT[rows_b, position] = drawn_b
            logps_BT[rows_b, position] = all_logps_bV.gather(1, drawn_b[:, None]).squeeze(1)
            closing_b = open_b & (torch.isin(drawn_b, self._stops) | (limit_B[rows_b] == position + 1))
            length_B[rows_b[closing_b]] = position + 1
            open_b &= ~closing_b
            still_open = int(open_b.sum())
            if not still_open:
                break
            if still_open < COMPACT_BELOW * len(rows_b):
                decoder.keep(open_b)
                rows_b, drawn_b, open_b = rows_b[open_b], drawn_b[open_b], open_b[open_b]
            logits_bV = decoder.next_logits(drawn_b)
        return self._completions(prompts, num_generations, ids_BT, logps_BT, length_B)

    def _room(self, prompt: list[int]) -> int:
        """New tokens that fit the model's context after `prompt`."""
        room = sys.maxsize if self._context is None else self._context - len(prompt)
        if room < 1:
            raise ModelError(f"a prompt of {len(prompt)} tokens fills the model's context of {self._context}")
        return room

    def _completions(
        self, prompts: list[list[int]], num_generations: int, ids_BT: Tensor, logps_BT: Tensor, length_B: Tensor
    ) -> list[Completion]:
        stops = set(self._stops.tolist())
        completions = []
        for i, (ids, logps, length) in enumerate(
            zip(ids_BT.tolist(), logps_BT.tolist(), length_B.tolist(), strict=True)
        ):
            ids, logps = ids[:length], logps[:length]
            if not all(map(math.isfinite, logps)):
                raise ModelError("the model's logits are not numbers; its weights or the adapter's are damaged")
            stopped = ids[-1] in stops
            text = self._text(prompts[i // num_generations][-1], ids[:-1] if stopped else ids)
            completions.append(Completion(ids, logps, "stop" if stopped else "length", text))
        return completions

    def _text(self, before: int, ids: list[int]) -> str:
        """`ids` as they read after the token `before`; alone, many tokenizers drop the space a word begins with."""
        head, whole = self._decode([before]), self._decode([before, *ids])
        return whole[len(head) :] if whole.startswith(head) else self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _Decoder:
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


def text_config(model: PreTrainedModel | PeftModel) -> PretrainedConfig:
    """The part of a model's config that is about its language model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(PreTrainedModel, base).config.get_text_config(decoder=True)


def context_of(model: PreTrainedModel | PeftModel) -> int | None:
    """The most tokens that prompt and completion may have together; None where the model names no limit."""
    context: int | None = getattr(text_config(model), "max_position_embeddings", None)
    return context


def stop_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a turn, by the tokenizer and by the model's generation settings."""
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return sorted({int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None})


def _cache_bytes_per_token(config: PretrainedConfig) -> int:
    """Keys and values of one token in all layers, at 4 bytes a number."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 4 * config.num_hidden_layers * heads * width)
